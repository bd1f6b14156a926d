"""Micro-batches that are read, and copied to the device, while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Copyable(Protocol):
    """Tensors in the memory of the host, or of a device."""

    def pinned(self) -> Copyable: ...

    def to(self, device: torch.device) -> Copyable: ...

    def record_stream(self, stream: torch.cuda.Stream) -> None: ...


Batch = TypeVar("Batch", bound=Copyable)
Job = Callable[[], list[Batch]]  # reads micro-batches


def read_ahead(jobs: Iterable[Job[Batch]], device: torch.device, ahead: int) -> Generator[list[Batch], None, None]:
    """Yield the micro-batches of each job on the device.

    A thread runs up to ``ahead`` jobs in advance; with 0, each job runs when its result is requested. Page-locked
    memory is copied on a separate stream, for which the current stream waits on the device, not on the host.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batches, copied in _in_advance((partial(_load, job, device, copies) for job in jobs), ahead):
        if copied is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for batch in batches:
                batch.record_stream(current)
        yield batches


def _load(job: Job[Any], device: torch.device, copies: torch.cuda.Stream | None) -> tuple[list[Any], Any]:
    """Return the micro-batches on the device, and the event that ends their copies; None without copies."""
    batches = job()
    if copies is None:
        return [batch.to(device) for batch in batches], None
    with torch.cuda.device(device), torch.cuda.stream(copies):  # of this thread
        return [batch.pinned().to(device) for batch in batches], copies.record_event()


def _in_advance(jobs: Iterable[Callable[[], T]], ahead: int) -> Generator[T, None, None]:
    """Yield the results of the jobs in order; a thread runs up to ``ahead`` jobs in advance."""
    if not ahead:
        for job in jobs:
            yield job()
        return
    pool, pending = ThreadPoolExecutor(1, thread_name_prefix="batches"), deque[Future[T]]()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
