"""Deletion of superseded checkpoints: --save-retain-interval and --keep-last."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_slm.config.checkpoint_files import MANIFEST_FILE, latest_step
from megatron_slm.config.checkpoint_steps import step_directories
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.console import warn
from megatron_slm.runtime.errors import ConfigError


class Retention:
    """Delete checkpoints after a save, except multiples of --save-retain-interval, and those that the command reads.

    With --keep-last N, the N newest checkpoints are kept. Otherwise, only the previous checkpoint is deleted, as in
    Megatron-LM. Steps after the saved one are not considered: the run has gone back and will replace them. The methods
    run on rank 0.
    """

    def __init__(self, config: RunConfig) -> None:
        checkpoint = config.checkpoint
        self._root = Path(checkpoint.save or "")
        self._interval, self._kept = checkpoint.save_retain_interval, checkpoint.keep_last
        self._read = {
            directory.resolve()
            for path, step in (
                (checkpoint.load, checkpoint.ckpt_step),
                (checkpoint.pretrained_checkpoint, None),
                *((path, config.reference.reference_ckpt_step) for path in config.reference.reference_load),
            )
            if path is not None
            for directory in (Path(path), *([] if step is None else [Path(path) / f"iter_{step:07d}"]))
        }
        self._previous: int | None = None

    def before_save(self) -> None:
        """Remember the newest checkpoint, before the tracker file is updated."""
        if self._interval is None and self._kept is None:
            return
        try:
            self._previous = latest_step(self._root)
        except ConfigError:
            self._previous = None  # invalid tracker file, which the save replaces

    def after_save(self, step: int) -> None:
        """Delete what the checkpoint of ``step`` supersedes."""
        for superseded, directory in self._superseded(step).items():
            is_retained = self._interval is not None and superseded % self._interval == 0
            if not is_retained and directory.resolve() not in self._read:
                _delete(directory)

    def _superseded(self, step: int) -> dict[int, Path]:
        """Return the checkpoints of this program that are not among the newest ones."""
        if self._interval is None and self._kept is None:
            return {}
        steps = {number: path for number, path in step_directories(self._root).items() if number < step}
        complete = {number: path for number, path in steps.items() if (path / MANIFEST_FILE).is_file()}
        if self._kept is None:
            return {number: path for number, path in complete.items() if number == self._previous}
        newest = sorted(complete, reverse=True)[: self._kept - 1]
        return {number: path for number, path in complete.items() if number not in newest}


def _delete(directory: Path) -> None:
    """Rename and delete a checkpoint, so that an interruption leaves no partial checkpoint under its name."""
    if directory.is_symlink():
        return
    doomed = directory.with_name(f".deleted-{directory.name}")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        warn(f"{directory} was superseded and could not be deleted ({error.strerror or error}).")
