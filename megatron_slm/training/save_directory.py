"""The --save directory: identity of its run, and preparation for a start."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

from megatron_slm.checkpoint.source import holds_only_weights
from megatron_slm.config.checkpoint_files import TRACKER, step_directory
from megatron_slm.config.checkpoint_steps import STEP_DIRECTORY, step_directories
from megatron_slm.config.paths import EVENTS_FILE, METRICS_FILE, STOP_FILE
from megatron_slm.config.recipe import to_flat_dict
from megatron_slm.config.run_record import RECORD_FILE, load_run_record
from megatron_slm.config.schema import CheckpointConfig, RunConfig
from megatron_slm.runtime.collective import is_first_rank, on_first_rank
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.files import explained_write, write_text
from megatron_slm.runtime.launch import SlurmJob, slurm_job
from megatron_slm.runtime.lock import DirectoryLock
from megatron_slm.runtime.software import environment
from megatron_slm.training.sinks import WANDB_ID_FILE

# Checkpoints that are being written, that a new one of the same step replaces, and that are being deleted.
LEFTOVER_DIRECTORY = re.compile(r"iter_[0-9]{7,}\.(partial|replaced)|\.deleted-iter_[0-9]{7,}")
DAMAGED_DIRECTORY = re.compile(r"iter_[0-9]{7,}\.damaged(-[0-9]+)?")
CHECKPOINT_FILE = re.compile(
    r".*\.distcp|\.metadata|metadata\.json|common\.pt|config\.yaml|data\.json|manifest\.json|\.(partial|rank)-.*"
)


@dataclass(frozen=True)
class Origin:
    """Represent the initial checkpoint of a run, outside of --save."""

    flag: str  # --load or --pretrained-checkpoint
    path: str  # absolute
    step: int | None  # --ckpt-step
    weights_only: bool


@dataclass(frozen=True)
class RunRecord:
    """Represent the identity of the run in a --save directory."""

    run_id: str
    origin: Origin | None  # None: from scratch
    job: SlurmJob = field(default_factory=slurm_job)  # the latest job of the run

    @staticmethod
    def new(origin: Origin | None) -> RunRecord:
        """Return the record of a new run."""
        return RunRecord(uuid.uuid4().hex, origin)


def read_record(directory: Path) -> RunRecord | None:
    """Return the record of the run in ``directory``, or None if it is missing or not valid."""
    try:
        content = load_run_record(directory)
        origin = content["origin"]
        return RunRecord(content["run_id"], None if origin is None else Origin(**origin), SlurmJob(**content["job"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_record(directory: Path, record: RunRecord, config: RunConfig) -> None:
    """Write the record of the run in ``directory``, with its settings and its environment at this start."""
    content = {**asdict(record), "environment": environment(), "settings": to_flat_dict(config)}
    text = json.dumps(content, indent=1) + "\n"
    write_text(directory / RECORD_FILE, text, "--save", is_ours=lambda path: read_record(path.parent) is not None)


def record_stop(save: str | None, reason: str | None) -> None:
    """Write to --save why the run stopped before its end, for batch scripts; None removes the file.

    Collective over all ranks.
    """
    if save is None:
        return
    path = Path(save) / STOP_FILE

    def write() -> None:
        if reason is not None:
            write_text(path, f"{reason}\n", "--save")
        else:
            with explained_write(path, "--save"):
                path.unlink(missing_ok=True)

    on_first_rank(write)


def holds_checkpoints(directory: Path) -> bool:
    """Return whether a run has saved checkpoints below ``directory``."""
    return (directory / TRACKER).is_file() or bool(step_directories(directory))


def remove_run(directory: Path) -> None:
    """Remove the checkpoints, metrics and record of the run in ``directory``; other files are kept."""
    with explained_write(directory, "--save"):
        for name in (TRACKER, RECORD_FILE, METRICS_FILE, EVENTS_FILE, STOP_FILE, WANDB_ID_FILE):
            (directory / name).unlink(missing_ok=True)
        for path in directory.iterdir():
            if any(pattern.fullmatch(path.name) for pattern in (STEP_DIRECTORY, LEFTOVER_DIRECTORY, DAMAGED_DIRECTORY)):
                shutil.rmtree(path)


def remove_leftovers(directory: Path) -> None:
    """Remove the incomplete checkpoints of an interrupted run. The caller holds the lock of the directory.

    Directories with a file that is not part of a checkpoint are kept. A checkpoint that was being replaced is restored.
    """
    with explained_write(directory, "--save"):
        for path in leftovers(directory):
            final = directory / path.name.removesuffix(".replaced")
            if path.suffix == ".replaced" and not final.exists():
                path.rename(final)
                continue
            shutil.rmtree(path)
            notice(f"--save {directory}: removed {path.name}, left by an interrupted run")


def leftovers(directory: Path) -> list[Path]:
    """Return the incomplete checkpoints in ``directory`` that were written by a run."""
    if not directory.is_dir():
        return []
    found = sorted(path for path in directory.iterdir() if LEFTOVER_DIRECTORY.fullmatch(path.name))
    return [path for path in found if path.is_dir() and not path.is_symlink() and _holds_only_checkpoint_files(path)]


def _holds_only_checkpoint_files(directory: Path) -> bool:
    return all(CHECKPOINT_FILE.fullmatch(path.name) for path in directory.iterdir())


def set_aside(directory: Path, steps: Sequence[int], newest: int) -> None:
    """Rename damaged checkpoints, so that later saves of their steps replace none, and point the tracker to ``newest``.

    Nothing is deleted: a damaged checkpoint may be repaired from a copy.
    """
    with explained_write(directory, "--save"):
        for step in steps:
            path = step_directory(directory, step)
            if path.exists():
                renamed = _unused_name(path.with_name(f"{path.name}.damaged"))
                path.rename(renamed)
                notice(f"--save {directory}: {path.name} is kept as {renamed.name}; delete it if you do not need it")
    write_text(directory / TRACKER, f"{newest}\n", "--save")


def _unused_name(path: Path) -> Path:
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in count(1))
    return next(name for name in names if not name.exists() and not name.is_symlink())


def belongs_to(path: str | None, directory: str | None) -> bool:
    """Return whether ``path`` is ``directory`` or one of its checkpoints."""
    if path is None or directory is None:
        return False
    resolved, run = Path(path).resolve(), Path(directory).resolve()
    return resolved == run or (resolved.parent == run and STEP_DIRECTORY.fullmatch(resolved.name) is not None)


def outside_origin(checkpoint: CheckpointConfig) -> Origin | None:
    """Return the initial checkpoint of the flags if it is outside of --save."""
    if checkpoint.load is not None and not belongs_to(checkpoint.load, checkpoint.save):
        path = str(Path(checkpoint.load).resolve())
        weights_only = checkpoint.finetune or holds_only_weights(path, checkpoint.ckpt_step)
        return Origin("--load", path, checkpoint.ckpt_step, weights_only=weights_only)
    if checkpoint.pretrained_checkpoint is not None and checkpoint.load is None:
        path = str(Path(checkpoint.pretrained_checkpoint).resolve())
        return Origin("--pretrained-checkpoint", path, None, weights_only=True)
    return None


@contextmanager
def locked_save(save: str | None) -> Iterator[None]:
    """Hold the lock of --save on rank 0 while a run is active. Collective over all ranks.

    Raises:
        ConfigError: another run is active in the directory; on every rank.
    """
    if save is None:
        yield
        return
    lock = DirectoryLock(save, "--save")
    on_first_rank(lock.acquire)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def unchanged_if_refused(save: str | None) -> Iterator[None]:
    """If the block raises, remove the files that the start created in --save, on rank 0."""
    created = [
        Path(save or "") / name
        for name in (RECORD_FILE, METRICS_FILE, WANDB_ID_FILE)
        if save is not None and is_first_rank() and not (Path(save) / name).exists()
    ]
    try:
        yield
    except BaseException:
        for path in created:
            with suppress(OSError):
                path.unlink()
        raise
