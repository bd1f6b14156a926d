"""Time of the forward passes of this rank, without a wait of the host for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_slm.runtime.health.progress import progress

_pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # of passes that the device may not have finished


@contextmanager
def forward_time(device: torch.device) -> Iterator[None]:
    """Add the time of the block on the device to the progress of this process, on a GPU when it has finished it."""
    if device.type != "cuda":
        start = time.perf_counter()
        yield
        progress.seconds_forward += time.perf_counter() - start
        return
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    yield
    last.record()
    _pending.append((first, last))


def count_step(seconds_loading: float) -> None:
    """Count a training step, and the forward passes that the device has finished."""
    progress.seconds_loading += seconds_loading
    while _pending and _pending[0][1].query():
        first, last = _pending.popleft()
        progress.seconds_forward += first.elapsed_time(last) / 1000
    progress.steps += 1
