"""Detect spikes of the loss and the gradient norm against their running mean and standard deviation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_slm.config.schema import TrainingConfig

LOSS, GRADIENT = "loss", "grad_norm"
SMALLEST_DEVIATION = 1e-3  # of the mean; below it, rounding of an almost constant value would count as a spike


@dataclass(frozen=True)
class Spike:
    """Represent a value above the limit of its running estimate."""

    metric: str  # LOSS or GRADIENT
    value: float
    limit: float
    mean: float
    deviation: float  # standard deviation
    steps: int  # of the estimate

    def __str__(self) -> str:
        name = {LOSS: "loss", GRADIENT: "gradient norm"}[self.metric]
        return (
            f"the {name} {self.value:.4g} exceeds {self.limit:.4g} (mean {self.mean:.4g}, standard deviation "
            f"{self.deviation:.2g} over {self.steps} steps)"
        )


class SpikeDetector:
    """Compare the loss and the gradient norm of each step with those of the preceding steps.

    A value is a spike if it exceeds the mean by more than a number of standard deviations. The estimate covers the last
    ``window`` steps, spikes included, so that it adapts to a lasting change; nothing is a spike before half of the
    window is filled. Every rank has the same state, since it depends on reduced values only.

    Args:
        window: number of steps of the estimate.
        threshold: number of standard deviations.
        metrics: examined metrics.
    """

    def __init__(self, window: int, threshold: float, metrics: tuple[str, ...] = (LOSS, GRADIENT)) -> None:
        self._threshold = threshold
        self._needed = max(window // 2, 2)
        self._values: dict[str, deque[float]] = {metric: deque(maxlen=window) for metric in metrics}

    @staticmethod
    def from_config(config: TrainingConfig) -> SpikeDetector:
        """Return the detector of a configuration."""
        checked = {LOSS: config.check_for_spiky_loss, GRADIENT: config.check_for_large_grads}
        metrics = tuple(metric for metric, is_checked in checked.items() if is_checked)
        return SpikeDetector(config.slm_spike_window, config.slm_spike_threshold, metrics)

    def observe(self, step: Mapping[str, float]) -> list[Spike]:
        """Return the spikes among the values of a step by metric, and add the values to the estimates."""
        spikes = []
        for metric, values in self._values.items():
            value = step[metric]
            if len(values) >= self._needed and (spike := self._examine(metric, value, values)) is not None:
                spikes.append(spike)
            values.append(value)
        return spikes

    def _examine(self, metric: str, value: float, values: deque[float]) -> Spike | None:
        mean = fmean(values)
        variance = math.fsum((each - mean) ** 2 for each in values) / len(values)
        deviation = max(math.sqrt(variance), SMALLEST_DEVIATION * abs(mean))
        limit = mean + self._threshold * deviation
        return Spike(metric, value, limit, mean, deviation, len(values)) if value > limit else None

    def state_dict(self) -> dict[str, Any]:
        """Return the values of the estimates."""
        return {metric: list(values) for metric, values in self._values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values that :meth:`state_dict` returned; a smaller window keeps the newest."""
        for metric, values in self._values.items():
            values.extend(state.get(metric, ()))
