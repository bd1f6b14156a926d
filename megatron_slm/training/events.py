"""Record steps with NaN, infinite or suddenly high losses and gradients, with their samples and documents."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_slm.config.paths import events_file
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.append import AppendFile, PatientWriter
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.console import warn
from megatron_slm.runtime.errors import ConfigError, DivergedError
from megatron_slm.runtime.metrics_file import EVENTS_FLAG
from megatron_slm.training.metrics import step_losses
from megatron_slm.training.spikes import GRADIENT, LOSS, Spike
from megatron_slm.training.state import TrainState
from megatron_slm.training.step import StepResults
from megatron_slm.training.step_report import SampleLosses, diverged_parameters, gather_samples, plain_number

Record = dict[str, Any]


class StepMonitor:
    """Implement the observer of a training run: NaN ends it, and spikes are recorded, skipped or end it.

    Every rank decides the same, since losses and gradient norm are reduced. Rank 0 writes the event.

    Args:
        state: state of the run.
        config: configuration of the run.
        dataset: training set.
        records: write events and warnings; otherwise events only take effect.
    """

    def __init__(self, state: TrainState, config: RunConfig, dataset: Any, *, records: bool = True) -> None:
        self._state, self._dataset, self._records = state, dataset, records
        self._action = config.training.slm_spike_action
        self._file = events_file(config) if records else None

    def accept(self, step: StepResults, grad_norm: float) -> bool:
        """Return whether the weights are updated, which they are not after an overflow of fp16.

        Raises:
            DivergedError: a loss or gradient is NaN or infinite, or a spike ends the run; on every rank.
        """
        if step.overflow and not step.sums.diverged:
            return False
        if step.sums.diverged or not math.isfinite(grad_norm):
            raise DivergedError(self._record_divergence(step, grad_norm))
        losses = step_losses(step.sums)
        spikes = self._state.spikes.observe({LOSS: losses["loss"], GRADIENT: grad_norm})
        if not spikes:
            return True
        message = self._record_spikes(step, spikes, losses, grad_norm) if self._records or self._stops else ""
        if self._stops:
            raise DivergedError(f"{message} (--slm-spike-action stop)")
        return self._action == "log"

    @property
    def _stops(self) -> bool:
        return self._action == "stop"

    @property
    def _number(self) -> int:
        return self._state.progress.step + 1

    def _record_divergence(self, step: StepResults, grad_norm: float) -> str:
        """Write the event, and return the message of the error. Collective over all ranks."""
        samples = gather_samples(step, self._state.groups)
        parameters = diverged_parameters(self._state)

        def record() -> str:
            places = _loss_places(samples) if step.sums.diverged else _gradient_places(grad_norm, parameters)
            ranks = {sample.rank for sample in samples if sample.diverged} or parameters
            event = {
                "event": "nan_loss" if step.sums.diverged else "nan_gradient",
                "ranks": sorted(ranks),
                "diverged": step.sums.diverged,
                "parameters": {str(rank): names for rank, names in parameters.items()},
                "action": "stop",
            }
            return self._write(event, places, step_losses(step.sums), grad_norm, samples)

        return on_first_rank(record)

    def _record_spikes(
        self, step: StepResults, spikes: Sequence[Spike], losses: dict[str, Any], grad_norm: float
    ) -> str:
        """Write the event and a warning, and return the message. Collective over all ranks."""
        samples = gather_samples(step, self._state.groups)

        def record() -> str:
            event = {
                "event": "spike",
                "ranks": [sample.rank for sample in samples[:1]],  # of the sample with the highest loss
                "spikes": [asdict(spike) for spike in spikes],
                "action": self._action,
            }
            text = f"{' and '.join(map(str, spikes))}; highest loss: {_place(samples[0])}" if samples else "spike"
            message = self._write(event, text, losses, grad_norm, samples)
            if self._records and not self._stops:
                warn(f"{message}{' The weights are not updated.' if self._action == 'skip' else ''}")
            return message

        return on_first_rank(record)

    def _write(
        self, event: Record, text: str, losses: dict[str, Any], grad_norm: float, samples: Sequence[SampleLosses]
    ) -> str:
        """Append the event to its file, if there is one, and return its message."""
        message = f"step {self._number}: {text}."
        if self._file is None:
            return message
        record = {
            "kind": "event",
            "step": self._number,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **event,
            "message": message,
            **{name: plain_number(losses[name]) for name in ("loss", "loss_all")},
            "grad_norm": plain_number(grad_norm),
            "lr": self._state.lr,
            "samples": [sample.record(self._dataset) for sample in samples],
        }
        append_event(self._file, record)
        return f"{message} Its samples and documents are in {self._file}; --replay-step {self._number} repeats it."


def append_event(path: Path, record: Record) -> None:
    """Append one event; a file that cannot be written is a warning."""
    try:
        writer = PatientWriter(AppendFile(path, EVENTS_FLAG), EVENTS_FLAG, warn)
    except ConfigError as error:
        warn(f"{error} The event was not recorded.")
        return
    writer.write(json.dumps(record).encode() + b"\n")
    writer.close()


def _loss_places(samples: Sequence[SampleLosses]) -> str:
    """Describe the NaN losses of a step, and the first of them."""
    diverged = [sample for sample in samples if sample.diverged]
    total, first = sum(sample.diverged for sample in diverged), diverged[0]
    assert first.first_diverged is not None
    token = first.first_diverged
    reference = "" if token.reference_loss is None else f", reference loss {token.reference_loss}"
    return (
        f"{total} losses are NaN or infinite; the first is on {_place(first)}, position {token.position}: token loss "
        f"{token.token_loss}{reference}"
    )


def _gradient_places(grad_norm: float, parameters: dict[int, list[str]]) -> str:
    """Describe the NaN gradients of a step with finite losses."""
    if not parameters:
        return f"all losses and gradients are finite, but the gradient norm is {grad_norm}"
    rank, names = next(iter(parameters.items()))
    where = f"first on rank {rank}: {', '.join(names)}"
    return f"the gradient norm is {grad_norm} and all losses are finite; NaN or infinite gradients {where}"


def _place(sample: SampleLosses) -> str:
    return f"rank {sample.rank}, sample {sample.sample} (micro-batch {sample.micro_batch}, row {sample.row})"
