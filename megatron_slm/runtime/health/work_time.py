"""Time of the forward passes of this rank, without a wait of the host for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_slm.runtime.health.progress import progress


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
    progress.pending_forwards.append((first, last))


def count_step(seconds_loading: float) -> None:
    """Count a training step, and the forward passes that the device has finished."""
    progress.seconds_loading += seconds_loading
    pending = progress.pending_forwards
    while pending and pending[0][1].query():
        first, last = pending.popleft()
        progress.seconds_forward += first.elapsed_time(last) / 1000
    progress.steps += 1
