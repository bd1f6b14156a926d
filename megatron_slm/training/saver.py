"""Save a run: synchronously, or in the background with --async-save.

In the background, each rank writes its files in a forked process while training continues. The next call after all
ranks have written completes the checkpoint: manifest, rename, tracker file, deletion of superseded checkpoints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from rich.console import Console

from megatron_slm.checkpoint.writing import write_now
from megatron_slm.config.schema import RunConfig
from megatron_slm.model.size import checkpoint_bytes
from megatron_slm.runtime.collective import gather_on_every_rank, is_first_rank, on_every_rank, on_first_rank
from megatron_slm.runtime.console import format_duration, warn
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.health.progress import progress
from megatron_slm.training.checkpoint import Save, begin_save, plan_save
from megatron_slm.training.free_space import check_space
from megatron_slm.training.retention import Retention
from megatron_slm.training.state import TrainState

logger = logging.getLogger(__name__)

SECONDS_FOR_RECORDS = 10.0  # of other ranks, which a network file system may show late
SECONDS_AFTER_ERROR = 60.0  # for other ranks to write their files after the run has failed


class Saver:
    """Save the checkpoints of a run. At most one save is in progress."""

    def __init__(self, state: TrainState, config: RunConfig, console: Console) -> None:
        self._state, self._config, self._console = state, config, console
        self._retention = Retention(config)
        self._queue = AsyncCallsQueue()
        self._pending: Save | None = None
        self._began = 0.0
        self._size = checkpoint_bytes(config, state.tokenizer.vocab_size)  # of the latest checkpoint, on rank 0

    def save(self) -> None:
        """Save the current step, after completing the previous save. Collective over all ranks.

        Raises:
            ConfigError: a checkpoint could not be written; on every rank. Earlier checkpoints are unchanged.
        """
        self.finish()
        self._began = time.perf_counter()
        save = plan_save(self._state, self._config)
        on_first_rank(lambda: check_space(save.final.parent, self._size))
        self._pending = save
        with self._explained(save):
            request = begin_save(save, self._state, self._config)
            if not self._config.checkpoint.async_save:
                on_every_rank(lambda: write_now(request))
        if self._config.checkpoint.async_save:
            self._start(save, request)
        else:
            self._complete(save)

    def _start(self, save: Save, request: AsyncRequest) -> None:
        # A blocking call of the queue has waited for the process of this rank; wait for those of the others.
        request.add_finalize_fn(partial(gather_on_every_rank, None))
        request.add_finalize_fn(partial(self._complete, save))
        with self._explained(save):
            on_every_rank(lambda: self._fork(request))
        paused = format_duration(time.perf_counter() - self._began)
        self._console.print(f"saving {save.final} in the background (training paused for {paused})", markup=False)

    def _fork(self, request: AsyncRequest) -> None:
        try:
            self._queue.schedule_async_request(request)
        except OSError as error:
            raise ConfigError(f"the process that writes the files could not be started: {error.strerror}.") from error

    def poll(self) -> None:
        """Complete the save in progress if all ranks have written their files. Collective over all ranks.

        Raises:
            ConfigError: the save failed; on every rank.
        """
        if self._pending is not None:
            progress.enter("completing a checkpoint", slow=True)
            self._queue.maybe_finalize_async_calls()

    def finish(self) -> None:
        """Wait for the save in progress, and complete it. Collective over all ranks.

        Raises:
            ConfigError: the save failed; on every rank.
        """
        if self._pending is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """If the block raises an error, complete the save in progress; on Ctrl+C, stop it."""
        try:
            yield
        except Exception:
            self._finish_after_error()
            raise
        except BaseException:
            self._abort()
            raise

    def _finish_after_error(self) -> None:
        """Complete the save in progress without communication, since other ranks may have ended."""
        save, self._pending = self._pending, None
        if save is None or not self._queue.async_calls:
            return
        self._queue.async_calls.popleft().async_caller.close()
        if not is_first_rank():
            return
        try:
            with self._explained(save):
                self._publish(save, SECONDS_AFTER_ERROR)
        except ConfigError as error:
            warn(str(error))
        else:
            self._report(save)

    def _abort(self) -> None:
        """Stop the save in progress; its files are removed by the next start."""
        while self._queue.async_calls:
            self._queue.async_calls.popleft().async_caller.close(abort=True)
        self._pending = None

    def _complete(self, save: Save) -> None:
        """Publish the checkpoint. Collective over all ranks."""
        with self._explained(save):
            on_first_rank(lambda: self._publish(save, SECONDS_FOR_RECORDS))
        self._pending = None
        self._report(save)

    def _publish(self, save: Save, seconds: float) -> None:
        self._retention.before_save()
        self._size = sum(save.complete(seconds).files.values())
        self._retention.after_save(save.step)

    def _report(self, save: Save) -> None:
        duration = format_duration(time.perf_counter() - self._began)
        logger.info("saved step %d", save.step)
        self._console.print(f"saved {save.final} in {duration}", markup=False)

    @contextmanager
    def _explained(self, save: Save) -> Iterator[None]:
        """If the save fails in the block, remove its files and add the consequence to the error."""
        try:
            yield
        except ConfigError as error:
            self._abort()
            if is_first_rank():
                save.discard()
            raise ConfigError(
                f"--save {self._config.checkpoint.save}: the checkpoint of step {save.step} could not be written: "
                f"{error} Check free disk space and permissions. Earlier checkpoints are unchanged."
            ) from error
