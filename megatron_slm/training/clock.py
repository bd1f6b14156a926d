"""Measure step times and estimate the remaining time, including evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Evaluation and save intervals of a run, in steps; None means only after the last step."""

    iterations: int
    eval_interval: int | None = None
    save_interval: int | None = None

    def left(self, step: int, interval: int | None) -> int:
        """Return the number of evaluations or saves at an interval after ``step``, including the final one."""
        if step >= self.iterations:
            return 0
        if interval is None:
            return 1
        return -(-self.iterations // interval) - step // interval


class StepClock:
    """Measure steps, evaluations and saves separately. :meth:`start` must be called before the first step."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._last = time.perf_counter()
        self._since_log, self._steps_since_log = 0.0, 0
        self._steps = _Mean(skips=1)  # the first step also warms up
        self._evaluations, self._saves = _Mean(), _Mean()

    def start(self) -> None:
        """Start timing the next step."""
        self._last = time.perf_counter()

    def tick(self, samples: int = 1) -> None:
        """Record the end of a step with a number of samples, which grows in a batch size ramp."""
        now = time.perf_counter()
        self._steps.add(now - self._last, samples)
        self._since_log += now - self._last
        self._steps_since_log += 1
        self._last = now

    def evaluating(self) -> AbstractContextManager[None]:
        """Count the time of the block as an evaluation, not as part of a step."""
        return self._timed(self._evaluations)

    def saving(self) -> AbstractContextManager[None]:
        """Count the time of the block as a save, not as part of a step."""
        return self._timed(self._saves)

    def seconds_per_step(self) -> float:
        """Return the mean step time in seconds since the last call."""
        mean = self._since_log / max(self._steps_since_log, 1)
        self._since_log, self._steps_since_log = 0.0, 0
        return mean

    def seconds_left(self, step: int, samples: int) -> float:
        """Estimate the seconds from ``step`` to the end of the run, which ``samples`` samples are left for."""
        schedule = self._schedule
        return (
            self._steps.value * samples
            + self._evaluations.value * schedule.left(step, schedule.eval_interval)
            + self._saves.value * schedule.left(step, schedule.save_interval)
        )

    @contextmanager
    def _timed(self, mean: _Mean) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._last = time.perf_counter()
            mean.add(self._last - start)


class _Mean:
    """Accumulate a weighted mean duration, excluding the first ``skips`` values if there are more."""

    def __init__(self, skips: int = 0) -> None:
        self._skips = skips
        self._total, self._count = 0.0, 0
        self._first = 0.0

    def add(self, seconds: float, weight: int = 1) -> None:
        if self._skips:
            self._skips -= 1
            self._first = seconds / weight
        else:
            self._total += seconds
            self._count += weight

    @property
    def value(self) -> float:
        return self._total / self._count if self._count else self._first
