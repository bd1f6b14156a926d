"""Repairs of Megatron-Core's synchronous save of distributed checkpoints."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

from megatron_slm.mcore.patching import replaced_attributes


@contextmanager
def deferred_save_errors(kinds: tuple[type[BaseException], ...]) -> Iterator[list[BaseException]]:
    """Collect the errors of files that Megatron-Core 0.16.1 writes on rank 0 alone.

    Raised in place they would leave the other ranks waiting in the next collective until its timeout.
    """
    errors: list[BaseException] = []

    def deferring(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*positional: Any, **options: Any) -> Any:
            try:
                return function(*positional, **options)
            except kinds as error:
                errors.append(error)

        return run

    places = (
        (TorchCommonSaveStrategy, "save_common"),
        (filesystem_async.FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    )
    with replaced_attributes(*((owner, name, deferring(getattr(owner, name))) for owner, name in places)):
        yield errors


def share_results_in_memory() -> None:
    """Give Megatron-Core's writer a plain queue for its results.

    It would otherwise start a process that holds the queue, for asynchronous saves. That process imports torch on every
    rank, which takes seconds and hundreds of MB; a synchronous save puts and gets in one process.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
