"""Slow ranks, from the time of each rank's work per step, in which it does not wait for other ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from megatron_slm.runtime.health.ranks import Beat, Identity

MIN_STEPS = 10  # of an interval that is compared
MIN_SECONDS = 5.0
MIN_EXCESS = 0.05  # seconds per step, below which a difference is noise


@dataclass(frozen=True)
class Straggler:
    """Represent the work of a rank per step, compared with the ranks of its pipeline stage."""

    identity: Identity
    seconds: float  # of the forward passes and of loading batches
    seconds_loading: float
    median: float

    @property
    def ratio(self) -> float:
        return self.seconds / max(self.median, 1e-9)

    def __str__(self) -> str:
        loading = f", {self.seconds_loading:.2f} s of it loading batches" if self.seconds_loading > 0.01 else ""
        return (
            f"{self.identity}: {self.seconds:.2f} s of work per step{loading}, {self.ratio:.1f} times the median "
            f"of {self.median:.2f} s"
        )


class StragglerTable:
    """Compare the ranks over intervals of steps."""

    def __init__(self) -> None:
        self._before: dict[int, Beat] = {}
        self._updated = time.monotonic()

    def update(self, beats: Sequence[tuple[Identity, Beat]]) -> list[Straggler] | None:
        """Return all ranks with their work since the last comparison, the slowest first; None before enough steps."""
        pairs = [(identity, self._before.setdefault(identity.rank, beat), beat) for identity, beat in beats]
        is_early = time.monotonic() - self._updated < MIN_SECONDS
        if len(pairs) < 2 or is_early or any(beat.steps - before.steps < MIN_STEPS for _, before, beat in pairs):
            return None
        self._before = {identity.rank: beat for identity, _, beat in pairs}
        self._updated = time.monotonic()
        work = [(identity, *_work(before, beat)) for identity, before, beat in pairs]
        stages = {identity.stage for identity, *_ in work}
        medians = {stage: median_low(total for each, total, _ in work if each.stage == stage) for stage in stages}
        ranks = [Straggler(each, total, loading, medians[each.stage]) for each, total, loading in work]
        return sorted(ranks, key=lambda rank: -rank.ratio)


def slow_ranks(ranks: Sequence[Straggler], factor: float) -> list[Straggler]:
    """Return the ranks whose work takes ``factor`` times the median, and noticeably longer."""
    return [rank for rank in ranks if rank.ratio > factor and rank.seconds - rank.median > MIN_EXCESS]


def _work(before: Beat, beat: Beat) -> tuple[float, float]:
    """Return the seconds of work per step, and those of loading."""
    steps = beat.steps - before.steps
    loading = (beat.seconds_loading - before.seconds_loading) / steps
    return loading + (beat.seconds_forward - before.seconds_forward) / steps, loading
