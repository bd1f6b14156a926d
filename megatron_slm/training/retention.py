"""Deletion of superseded checkpoints (--save-retain-interval)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_slm.config.checkpoint_files import latest_step, step_directory
from megatron_slm.config.schema import CheckpointConfig
from megatron_slm.runtime.console import warn
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import Groups


class Retention:
    """Keep the newest checkpoint and those whose step is a multiple of --save-retain-interval."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._root = Path(config.save or "")
        self._interval = config.save_retain_interval

    @contextmanager
    def around_save(self, step: int, groups: Groups) -> Iterator[None]:
        """Delete the previous checkpoint after the block saved ``step``, unless it must be retained."""
        previous = self._newest() if self._interval is not None and groups.is_logging_rank else None
        yield
        if previous is not None and self._interval is not None and previous < step and previous % self._interval:
            _delete(step_directory(self._root, previous))

    def _newest(self) -> int | None:
        try:
            return latest_step(self._root)
        except ConfigError:
            return None  # invalid tracker file, which the save replaces


def _delete(directory: Path) -> None:
    """Rename and delete a checkpoint, so that an interruption leaves no partial checkpoint under its name."""
    if directory.is_symlink() or not directory.is_dir():
        return
    doomed = directory.with_name(f".deleted-{directory.name}")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        warn(f"--save-retain-interval: {directory} was not deleted ({error.strerror or error}).")
