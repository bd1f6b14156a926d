"""Workarounds for Megatron-Core's saving of distributed checkpoints."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

from megatron_slm.mcore.patching import replaced_attributes


@contextmanager
def deferred_save_errors(kinds: tuple[type[BaseException], ...]) -> Iterator[list[BaseException]]:
    """Collect errors of ``common.pt``, which Megatron-Core 0.16.1 writes only on rank 0.

    Raised immediately, they would block the other ranks in the next collective until its timeout.
    """
    errors: list[BaseException] = []

    def deferring(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*positional: Any, **options: Any) -> Any:
            try:
                return function(*positional, **options)
            except kinds as error:
                errors.append(error)

        return run

    with replaced_attributes((TorchCommonSaveStrategy, "save_common", deferring(TorchCommonSaveStrategy.save_common))):
        yield errors


def share_results_in_memory() -> None:
    """Make Megatron-Core's writer use an in-process queue for its results, which are recorded in files here.

    Its default queue needs a manager process per rank. That process imports torch, which takes seconds and hundreds of
    MB.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
