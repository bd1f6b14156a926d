"""Relations of checkpoint settings, and directories that must be writable."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_slm.config.schema import Config


def checkpoints(config: Config, _: int) -> Iterator[str]:
    """Checkpoint settings name the directory that they are about."""
    checkpoint = config.checkpoint
    if checkpoint.save is None and checkpoint.save_interval is not None:
        yield "--save-interval needs --save, a folder."
    if checkpoint.load is None and checkpoint.finetune:
        yield "--finetune needs --load, the weights to begin from."


def output_directories(config: Config, _: int) -> Iterator[str]:
    """Every output directory can be written."""
    for flag, directory in (
        ("--save", config.checkpoint.save),
        ("--tensorboard-dir", config.logging.tensorboard_dir),
        ("--data-cache-path", config.data.data_cache_path),
    ):
        if directory is not None:
            yield from _unwritable(flag, Path(directory))
    if config.logging.slm_metrics_file is not None:
        yield from _unwritable("--slm-metrics-file", Path(config.logging.slm_metrics_file).parent)


def _unwritable(flag: str, directory: Path) -> Iterator[str]:
    """Yield a message if a trial write fails; permission bits do not show read-only mounts and full disks."""
    try:
        place = directory
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            yield f"{flag} {directory}: {place} is a file, not a folder."
            return
        with tempfile.TemporaryDirectory(prefix=".writable-", dir=place):
            pass
    except OSError as error:
        yield (
            f"{flag} {directory}: {error.filename or directory} cannot be written ({error.strerror}). Give a folder on "
            "a disk with room that this user may write."
        )


RELATIONS = (checkpoints, output_directories)
