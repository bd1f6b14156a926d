"""Check of the free disk space before a checkpoint is written, and at the start for all checkpoints of the run."""

from __future__ import annotations

from pathlib import Path

from megatron_slm.config.checkpoint_files import file_sizes
from megatron_slm.config.checkpoint_steps import step_directories
from megatron_slm.config.schema import CheckpointConfig, RunConfig
from megatron_slm.model.size import checkpoint_bytes
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import format_size, free_space
from megatron_slm.training.save_directory import leftovers
from megatron_slm.training.start import Start


def check_start_space(config: RunConfig, vocab_size: int, start: Start) -> None:
    """Validate that one checkpoint fits on the disk of --save, and note if those of the run do not.

    Directories that the start removes count as free space.

    Raises:
        ConfigError: not even one checkpoint fits.
    """
    checkpoint = config.checkpoint
    if checkpoint.save is None or config.training.skip_train:
        return
    save, size = Path(checkpoint.save), checkpoint_bytes(config, vocab_size)
    removed = [*leftovers(save), *(step_directories(save).values() if start.overwrites else ())]
    free = check_space(save, size, reclaimed=sum(sum(file_sizes(path).values()) for path in removed))
    kept = kept_checkpoints(checkpoint, config.training.train_iters)
    if free is not None and kept * size > free:
        notice(
            f"--save {save}: up to {kept} checkpoints of {format_size(size)} need {format_size(kept * size)}, and "
            f"{format_size(free)} are free. Delete superseded ones with --keep-last, or set a larger --save-interval."
        )


def check_space(directory: Path, size: int, reclaimed: int = 0) -> int | None:
    """Return the free bytes on the disk of ``directory``; None if the file system does not report them.

    Args:
        directory: the --save directory, which need not exist.
        size: size of the next checkpoint.
        reclaimed: bytes that are deleted before it is written.

    Raises:
        ConfigError: a checkpoint of ``size`` bytes does not fit.
    """
    if (unused := free_space(directory)) is None:
        return None
    free = unused + reclaimed
    if free < size:
        raise ConfigError(
            f"--save {directory}: a checkpoint needs {format_size(size)}, and {format_size(free)} are free. Free disk "
            "space, choose another directory, or delete superseded checkpoints with --keep-last."
        )
    return free


def kept_checkpoints(checkpoint: CheckpointConfig, iterations: int) -> int:
    """Return the largest number of checkpoints of a run that exist at the same time."""
    interval, retained = checkpoint.save_interval, checkpoint.save_retain_interval
    saves = 1 if interval is None else -(-iterations // interval)
    if checkpoint.keep_last is None and retained is None:
        return saves
    kept = (checkpoint.keep_last or 1) + 1 + (iterations // retained if retained is not None else 0)
    return min(saves, kept)
