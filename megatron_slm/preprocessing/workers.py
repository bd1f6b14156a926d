"""Ordered parallel map over a stream of items in worker processes, with a bounded number of items in flight."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from megatron_slm.runtime.errors import ConfigError

AHEAD = 3  # items in flight per worker
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def worker_processes(
    count: int, work: Callable[[Item], Result]
) -> Iterator[Callable[[Iterable[Item]], Iterator[tuple[Item, Result]]]]:
    """Fork ``count`` worker processes that run ``work``; a single worker runs in this process.

    Yields:
        a function from an iterable of items to (item, result) pairs in order. At most ``AHEAD * count`` unfinished
        items are consumed, which bounds the memory. It propagates errors of ``work``, and raises ConfigError if a
        worker was killed.
    """
    if count == 1:
        yield lambda items: ((item, work(item)) for item in items)
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start, (work,))
    try:
        pool.submit(os.getpid).result()  # forks all workers before this process opens files or starts threads
        yield lambda items: _in_order(pool, items, AHEAD * count)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, items: Iterable[Any], ahead: int) -> Iterator[tuple[Any, Any]]:
    pending: deque[tuple[Any, Future[Any]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(_work, item)))
            if len(pending) == ahead:
                yield _done(*pending.popleft())
        while pending:
            yield _done(*pending.popleft())
    except BrokenProcessPool as error:
        raise ConfigError(
            "--workers: a worker process was killed. If it ran out of memory (see dmesg), use fewer workers."
        ) from error


def _done(item: Any, future: Future[Any]) -> tuple[Any, Any]:
    return item, future.result()


def _start(work: Callable[[Any], Any]) -> None:
    """Initialize a worker: store its function, ignore Ctrl-C, and exit when the parent exits."""
    _worker_function.append(work)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "called only in workers"
    parent.join()
    os._exit(1)


def _work(item: Any) -> Any:
    return _worker_function[0](item)


_worker_function: list[Callable[[Any], Any]] = []  # inherited by fork, because closures cannot be pickled
