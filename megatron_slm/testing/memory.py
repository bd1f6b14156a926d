"""Peak of the memory that torch allocates in a run on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.profiler import ProfilerActivity, profile

from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import captured

EVENT = "[memory]"


def peak_bytes(action: Callable[[], object]) -> int:
    """Return the largest sum of live allocations of torch's CPU allocator during ``action``, which starts from none.

    Memory of the interpreter, of libraries and of NumPy is not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    events = [event for event in results.kineto_results.events() if event.name() == EVENT]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def run_peaks(argv: Sequence[str], ranks: int) -> list[int]:
    """Run the trainer, and return the peak of each rank."""
    return run_ranks(_rank_peak, ranks, list(argv), initialise=False)


def _rank_peak(rank: int, world_size: int, argv: list[str]) -> int:
    codes: list[tuple[int, str]] = []

    def action() -> None:
        outcome = captured(argv)
        codes.append((outcome.code, outcome.errors))

    peak = peak_bytes(action)
    assert codes[0][0] == 0, codes[0][1]
    return peak
