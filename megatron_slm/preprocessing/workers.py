"""Work on a stream of items in several processes: in order, with a bounded number of items under way."""

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

AHEAD = 3  # items under way for each worker
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def worker_processes(
    count: int, work: Callable[[Item], Result]
) -> Iterator[Callable[[Iterable[Item]], Iterator[tuple[Item, Result]]]]:
    """Processes that all have ``work``, forked now; with one worker, this process does the work itself.

    Yields:
        a function from items to (item, result) in their order. It takes at most ``AHEAD * count`` items that are not
        done yet from its argument, so that memory does not grow with their number. Errors of ``work`` are raised from
        it, and ConfigError where a worker was killed.
    """
    if count == 1:
        yield lambda items: ((item, work(item)) for item in items)
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start, (work,))
    try:
        pool.submit(os.getpid).result()  # forks all of them, before this process has opened files or begun threads
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
            "--workers: a worker process was killed. If memory was short (dmesg tells), give fewer workers."
        ) from error


def _done(item: Any, future: Future[Any]) -> tuple[Any, Any]:
    return item, future.result()


def _start(work: Callable[[Any], Any]) -> None:
    """Begin a worker: keep its work, leave Ctrl-C to the parent, and end when the parent is no more."""
    _held.append(work)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in workers only"
    parent.join()
    os._exit(1)


def _work(item: Any) -> Any:
    return _held[0](item)


_held: list[Callable[[Any], Any]] = []  # what this worker process does: an executor cannot pass it along otherwise
