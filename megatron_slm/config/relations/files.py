"""Relations of checkpoint settings, and directories that must be writable."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_slm.config.paths import metrics_file
from megatron_slm.config.schema import Config
from megatron_slm.runtime.append import NOT_APPENDABLE, can_be_appended_to, is_stream
from megatron_slm.runtime.metrics_file import METRICS_FLAG, foreign_message, is_foreign


def checkpoints(config: Config, _: int) -> Iterator[str]:
    """Checkpoint settings name the directory that they are about."""
    checkpoint = config.checkpoint
    if checkpoint.save is None and checkpoint.save_interval is not None:
        yield "--save-interval needs --save, a folder."
    interval, retained = checkpoint.save_interval, checkpoint.save_retain_interval
    if retained is not None and interval is None:
        yield f"--save-retain-interval {retained} needs --save-interval, of which it is a multiple."
    elif retained is not None and interval is not None and retained % interval:
        yield f"--save-retain-interval {retained} is not a multiple of --save-interval {interval}."
    if checkpoint.ckpt_step is not None and checkpoint.load is None:
        yield f"--ckpt-step {checkpoint.ckpt_step} has no effect without --load. Add --load, or leave it out."
    if config.training.skip_train and checkpoint.load is None and checkpoint.pretrained_checkpoint is None:
        yield "--skip-train evaluates a checkpoint: name it with --load."
    if checkpoint.load is None and checkpoint.finetune:
        yield "--finetune needs --load, the weights to begin from."


def output_directories(config: Config, world_size: int) -> Iterator[str]:
    """Every output directory can be written. On several ranks, one of them checks that when the group exists."""
    if world_size == 1:
        yield from unwritable_outputs(config)


def unwritable_outputs(config: Config) -> Iterator[str]:
    """Yield a message for every output directory that cannot be written, and for an unsuitable metrics file."""
    for flag, directory in (
        ("--save", config.checkpoint.save),
        ("--tensorboard-dir", config.logging.tensorboard_dir),
        ("--slm-log-dir", config.logging.slm_log_dir),
        ("--data-cache-path", config.data.data_cache_path),
    ):
        is_cache = flag == "--data-cache-path" and Path(directory or "").is_dir()  # it may be complete, and is optional
        if directory is not None and not is_cache:
            yield from _unwritable(flag, Path(directory))
    if (path := metrics_file(config)) is not None:
        yield from _metrics_file(path, is_given=config.logging.slm_metrics_file is not None)


def _metrics_file(path: Path, *, is_given: bool) -> Iterator[str]:
    """Yield a message if ``path`` is someone else's file or no file, or its directory, if not --save, is unwritable."""
    try:
        if not can_be_appended_to(path):
            yield f"{METRICS_FLAG} {path}: {NOT_APPENDABLE}. Choose another path."
            return
        if is_stream(path):
            return  # appended to; its directory, such as /dev, is not written
        if is_foreign(path):
            yield foreign_message(path)
    except OSError as error:
        yield f"{METRICS_FLAG} {path} cannot be read ({error.strerror}). Choose another path."
    else:
        if is_given:
            yield from _unwritable(METRICS_FLAG, path.parent)


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
