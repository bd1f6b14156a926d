"""Step times and the time left, evaluations and checkpoints included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The steps after which a run evaluates and saves; an interval of None: after the last step only."""

    iterations: int
    eval_interval: int | None = None
    save_interval: int | None = None

    def evaluations_left(self, step: int) -> int:
        """Return the number of evaluations after ``step``, the one after the last step included."""
        return self._left(step, self.eval_interval)

    def saves_left(self, step: int) -> int:
        """Return the number of checkpoints after ``step``, the one after the last step included."""
        return self._left(step, self.save_interval)

    def _left(self, step: int, interval: int | None) -> int:
        if step >= self.iterations:
            return 0
        if interval is None:
            return 1
        return -(-self.iterations // interval) - step // interval


class StepClock:
    """Measures steps, evaluations and saves separately; :meth:`start` is called when the first step begins."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._last = time.perf_counter()
        self._since_log, self._steps_since_log = 0.0, 0
        self._steps = _Mean(skips=1)  # the first step also warms up
        self._evaluations, self._saves = _Mean(), _Mean()

    def start(self) -> None:
        """Begin the next step now."""
        self._last = time.perf_counter()

    def tick(self) -> None:
        """Count a step that ends now."""
        now = time.perf_counter()
        self._steps.add(now - self._last)
        self._since_log += now - self._last
        self._steps_since_log += 1
        self._last = now

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the block as an evaluation, not as part of a step."""
        with self._apart(self._evaluations):
            yield

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the block as a save, not as part of a step."""
        with self._apart(self._saves):
            yield

    def seconds_per_step(self) -> float:
        """Return the mean over the steps since the last call."""
        mean = self._since_log / max(self._steps_since_log, 1)
        self._since_log, self._steps_since_log = 0.0, 0
        return mean

    def seconds_left(self, step: int) -> float:
        """Estimate the time from ``step`` to the end of the run."""
        plan = self._schedule
        return (
            self._steps.value * (plan.iterations - step)
            + self._evaluations.value * plan.evaluations_left(step)
            + self._saves.value * plan.saves_left(step)
        )

    @contextmanager
    def _apart(self, mean: _Mean) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._last = time.perf_counter()
            mean.add(self._last - began)


class _Mean:
    """Mean duration without the first ``skips`` ones, if there are more."""

    def __init__(self, skips: int = 0) -> None:
        self._skips = skips
        self._total, self._count = 0.0, 0
        self._first = 0.0

    def add(self, seconds: float) -> None:
        if self._skips:
            self._skips -= 1
            self._first = seconds
        else:
            self._total += seconds
            self._count += 1

    @property
    def value(self) -> float:
        return self._total / self._count if self._count else self._first
