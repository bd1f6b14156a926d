"""Peak of the memory that torch allocates in a run on CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import captured


def peak_bytes(action: Callable[[], object]) -> int:
    """Return the largest sum of live allocations of torch's CPU allocator during ``action``, which starts from none.

    Memory of the interpreter, of libraries and of NumPy is not counted.
    """
    with _counting_all_threads(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    totals = [fields.total_allocated for fields in _allocations(results.kineto_results.experimental_event_tree())]
    return max(totals, default=0)


def _allocations(events: Sequence[Any]) -> Iterator[Any]:
    """Yield the allocations and deallocations among events and all their children."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.extra_fields


@contextmanager
def _counting_all_threads() -> Iterator[None]:
    """Let torch count the allocations of threads that the profiler does not see.

    A thread of gloo may be the last one that releases a tensor. Without the count, the sum of the profiler's events
    keeps such tensors, a random number of them in each run.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    flag = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")
    flag.value = True
    try:
        yield
    finally:
        flag.value = False


def run_peaks(argv: Sequence[str], ranks: int) -> list[int]:
    """Run the trainer, and return the peak of each rank."""
    return run_ranks(_rank_peak, ranks, list(argv), initialize=False)


def _rank_peak(rank: int, world_size: int, argv: list[str]) -> int:
    codes: list[tuple[int, str]] = []

    def action() -> None:
        outcome = captured(argv)
        codes.append((outcome.code, outcome.errors))

    peak = peak_bytes(action)
    assert codes[0][0] == 0, codes[0][1]
    return peak
