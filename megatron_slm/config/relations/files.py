"""Relations of checkpoint settings, and writability of output directories."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_slm.config.paths import events_file, metrics_file
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.append import NOT_APPENDABLE, can_be_appended_to, is_stream
from megatron_slm.runtime.metrics_file import EVENTS_FLAG, METRICS_FLAG, foreign_message, is_foreign


def checkpoints(config: RunConfig, _: int) -> Iterator[str]:
    """Require a directory for the checkpoint settings that refer to one."""
    checkpoint, saves = config.checkpoint, config.training.replay_step is None
    interval, retained = checkpoint.save_interval, checkpoint.save_retain_interval
    if retained is not None and interval is None:
        yield f"--save-retain-interval {retained} needs --save-interval and must be a multiple of it."
    elif retained is not None and interval is not None and retained % interval:
        yield f"--save-retain-interval {retained} is not a multiple of --save-interval {interval}."
    for flag, is_given in (
        ("--save-interval", checkpoint.save_interval is not None),
        ("--async-save", checkpoint.async_save),
        ("--keep-last", checkpoint.keep_last is not None),
    ):
        if saves and is_given and checkpoint.save is None:
            yield f"{flag} needs --save, the output directory."
    if checkpoint.ckpt_step is not None and checkpoint.load is None:
        yield f"--ckpt-step {checkpoint.ckpt_step} has no effect without --load. Add --load, or leave it out."
    if config.training.skip_train and checkpoint.load is None and checkpoint.pretrained_checkpoint is None:
        yield "--skip-train evaluates a checkpoint: give it with --load."
    if checkpoint.load is None and checkpoint.finetune:
        yield "--finetune needs --load, the initial weights."


def reference_directory(config: RunConfig, _: int) -> Iterator[str]:
    """Require the directories of the reference models, which an evaluation does not read."""
    for path in () if config.training.skip_train else config.reference.reference_load:
        if not Path(path).is_dir():
            yield (
                f"--reference-load {path}: there is no such directory. Give the --save directory of a reference model "
                "trained with --objective clm, or the directory of a published model."
            )


def replay(config: RunConfig, _: int) -> Iterator[str]:
    """Relations of --replay-step."""
    training, report = config.training, config.logging.replay_report
    if training.replay_step is None:
        if report is not None:
            yield f"--replay-report {report} has no effect without --replay-step. Add the step, or leave it out."
        return
    if training.replay_step in training.iterations_to_skip:
        yield f"--replay-step {training.replay_step} is in --iterations-to-skip. Leave it out there."
    if training.skip_train:
        yield "--replay-step trains, and --skip-train does not. Give one of them."
    if training.train_samples is None and training.replay_step > training.train_iters:
        yield (
            f"--replay-step {training.replay_step} is beyond the end of the run, --train-iters {training.train_iters}. "
            "Choose a smaller step."
        )


def wandb(config: RunConfig, _: int) -> Iterator[str]:
    """Settings of Weights & Biases need its project."""
    logging = config.logging
    for flag, value in (("--wandb-exp-name", logging.wandb_exp_name), ("--wandb-save-dir", logging.wandb_save_dir)):
        if value is not None and logging.wandb_project is None:
            yield f"{flag} {value} has no effect without --wandb-project. Add --wandb-project, or leave it out."


def _missing_wandb(config: RunConfig) -> Iterator[str]:
    """Yield a message if the package of Weights & Biases is needed and not installed.

    The directory ``wandb`` that an offline run leaves behind can be imported too, as a package without content.
    """
    if config.logging.wandb_project is None or "wandb" in sys.modules:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        yield "--wandb-project needs the package wandb: pip install wandb."


def output_directories(config: RunConfig, world_size: int) -> Iterator[str]:
    """Require writable output directories; on several ranks, one rank checks this after the process group exists."""
    if world_size == 1:
        yield from unwritable_outputs(config)


def unwritable_outputs(config: RunConfig) -> Iterator[str]:
    """Yield a message for every output that cannot be written: directories, the metrics file, Weights & Biases.

    A replay has no output but its report, and the run that it repeats may be another user's.
    """
    if config.training.replay_step is not None:
        if config.logging.replay_report is not None:
            yield from _unwritable("--replay-report", Path(config.logging.replay_report).parent)
        return
    yield from _missing_wandb(config)
    for flag, directory in (
        ("--save", config.checkpoint.save),
        ("--tensorboard-dir", config.logging.tensorboard_dir),
        ("--slm-log-dir", config.logging.slm_log_dir),
        ("--wandb-save-dir", config.logging.wandb_save_dir),
        ("--data-cache-path", config.data.data_cache_path),
        ("--memory-snapshot-path", _parent(config.diagnostics.memory_snapshot_path)),
        ("--flight-recorder-dump-path", _parent(config.diagnostics.flight_recorder_dump_path)),
    ):
        is_cache = flag == "--data-cache-path" and Path(directory or "").is_dir()  # optional, and may be complete
        if directory is not None and not is_cache:
            yield from _unwritable(flag, Path(directory))
    logging = config.logging
    for flag, record_file, given in (
        (METRICS_FLAG, metrics_file(config), logging.slm_metrics_file),
        (EVENTS_FLAG, events_file(config), logging.slm_events_file),
    ):
        if record_file is not None:
            yield from _record_file(flag, record_file, is_given=given is not None)


def _parent(path: str | None) -> str | None:
    """Return the directory of a file."""
    return None if path is None else str(Path(path).parent)


def _record_file(flag: str, path: Path, *, is_given: bool) -> Iterator[str]:
    """Yield a message if ``path`` is not a file of records, or if its directory is unwritable and not --save."""
    try:
        if not can_be_appended_to(path):
            yield f"{flag} {path}: {NOT_APPENDABLE}. Choose another path."
            return
        if is_stream(path):
            return  # opened for appending; its directory, such as /dev, need not be writable
        if is_foreign(path):
            yield foreign_message(path, flag)
    except OSError as error:
        yield f"{flag} {path} cannot be read ({error.strerror}). Choose another path."
    else:
        if is_given:
            yield from _unwritable(flag, path.parent)


def _unwritable(flag: str, directory: Path) -> Iterator[str]:
    """Yield a message if a trial write fails; permission bits do not reveal read-only mounts and full disks."""
    try:
        existing = directory
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            yield f"{flag} {directory}: {existing} is a file, not a directory. Choose another path."
            return
        with tempfile.TemporaryDirectory(prefix=".writable-", dir=existing):
            pass
    except OSError as error:
        yield (
            f"{flag} {directory}: {error.filename or directory} cannot be written ({error.strerror}). Choose a "
            "directory with write permission and free disk space."
        )


def benchmarks(config: RunConfig, _: int) -> Iterator[str]:
    """Require benchmarks and their data together."""
    logging = config.logging
    if logging.eval_tasks and logging.tasks_dir is None:
        yield "--eval-tasks needs --tasks-dir, the directory of its data (docs/evaluation.md)."
    if not logging.eval_tasks:
        for flag, is_given in (
            ("--tasks-dir", logging.tasks_dir is not None),
            ("--eval-tasks-limit", logging.eval_tasks_limit is not None),
        ):
            if is_given:
                yield f"{flag} has no effect without --eval-tasks. Add it, or leave {flag} out."


RELATIONS = (reference_directory, checkpoints, replay, wandb, benchmarks, output_directories)
