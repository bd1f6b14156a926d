"""Determine the start of a run: from scratch, from the weights of a checkpoint, or a resume.

The decision depends on the flags and on the files in their directories. It is made on one rank before anything is
built, and is printed.

    --load X --save X                    resume X; start a new run if X has no checkpoint
    --load B --save X                    continue B in X; resume X if it has a checkpoint of that run
    --load B --finetune --save X         start from the weights of B; resume X if it has a checkpoint of that run
    --pretrained-checkpoint B --save X   same as --load B --finetune --save X
    --load P --save X                    start from the weights of the published model P, as with --finetune
    --save X                             start a new run; refused if X contains a run
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_slm.checkpoint.source import find_foreign, is_published, steps_to_try
from megatron_slm.config.checkpoint_files import MANIFEST_FILE, TRACKER, step_directory
from megatron_slm.config.checkpoint_steps import STEP_DIRECTORY, choose_step, locate_checkpoint
from megatron_slm.config.schema import CheckpointConfig, RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_replaceable, explained_write
from megatron_slm.runtime.launch import slurm_job
from megatron_slm.training.save_directory import (
    Origin,
    RunRecord,
    belongs_to,
    holds_checkpoints,
    outside_origin,
    read_record,
    remove_leftovers,
    remove_run,
    set_aside,
    write_record,
)

OVERWRITE = "--slm-overwrite-save"


@dataclass(frozen=True)
class Checkpoint:
    """Represent a checkpoint to load, by the arguments that locate it on every rank."""

    flag: str
    path: str
    step: int | None  # None: ``path`` is the checkpoint directory
    alternatives: tuple[int, ...] = ()  # steps to use if this one is damaged, best first

    @property
    def directory(self) -> Path:
        """Return the checkpoint directory."""
        return Path(self.path) if self.step is None else step_directory(Path(self.path), self.step)


@dataclass(frozen=True)
class Start:
    """Represent the start of a run."""

    checkpoint: Checkpoint | None = None  # None: from scratch
    weights_only: bool = False  # start at step 0 with the checkpoint's weights
    record: RunRecord | None = None  # identity to write into --save
    overwrites: bool = False  # remove the run in --save first
    trains: bool = True  # False with --skip-train
    ignores_save: bool = False  # --save does not contain the evaluated run
    note: str = ""  # reason for this checkpoint, if the flags do not imply it
    damaged: tuple[int, ...] = ()  # damaged steps that were preferred to this checkpoint

    def describe(self, save: str | None) -> str:
        """Return one line for the log."""
        if not self.trains and self.checkpoint is not None:
            return f"evaluating {self.checkpoint.directory}, without training or saving{self._shown_note}"
        into = f", saved in {save}" if save else ", not saved (no --save)"
        if self.checkpoint is None:
            text = f"new run{into}"
        elif self.weights_only:
            text = f"new run from the weights of {self.checkpoint.directory}{into}"
        else:
            text = f"resuming from {self.checkpoint.directory}{into}"
        removed = f"; the existing run in {save} is removed ({OVERWRITE})" if self.overwrites else ""
        return f"{text}{removed}{self._shown_note}"

    @property
    def _shown_note(self) -> str:
        return f" ({self.note})" if self.note else ""

    def adjusted(self, config: RunConfig) -> RunConfig:
        """Return the settings of the run: --no-load-optim and --no-load-rng apply to the origin, not to its resume.

        An evaluation has no --save, unless --save contains the evaluated run; its metrics then include the result.
        """
        record, flags = self.record, config.checkpoint
        if self.ignores_save:
            return replace(config, checkpoint=replace(flags, save=None))
        if record is None or record.origin is None or self.checkpoint is None or self.checkpoint.flag != "--save":
            return config
        loads = replace(
            flags, load_optim=flags.load_optim or flags.save_optim, load_rng=flags.load_rng or flags.save_rng
        )
        return replace(config, checkpoint=loads)


def plan_start(config: RunConfig) -> Start:
    """Return the start of a run; reads directories without changing them.

    Raises:
        ConfigError: a checkpoint does not exist, or --save contains another run.
    """
    if config.training.skip_train:
        return _plan_evaluation(config.checkpoint)
    _check_overwrite(config)
    return _plan(config.checkpoint)


def prepare_save(config: RunConfig, start: Start) -> None:
    """Prepare the --save directory for the start of a run."""
    save = config.checkpoint.save
    if save is None or start.record is None or config.training.skip_train:
        return
    if start.overwrites:
        remove_run(Path(save))
    with explained_write(save, "--save"):
        Path(save).mkdir(parents=True, exist_ok=True)
    check_replaceable(Path(save) / TRACKER, "--save")
    write_record(Path(save), start.record, config)
    remove_leftovers(Path(save))
    checkpoint = start.checkpoint
    if start.damaged and checkpoint is not None and checkpoint.step is not None and belongs_to(checkpoint.path, save):
        set_aside(Path(save), start.damaged, newest=checkpoint.step)


def _check_overwrite(config: RunConfig) -> None:
    flags = config.checkpoint
    if not flags.slm_overwrite_save:
        return
    if flags.save is None:
        raise ConfigError(f"{OVERWRITE} needs --save, the directory of the run to overwrite.")
    read = {
        "--load": flags.load,
        "--pretrained-checkpoint": flags.pretrained_checkpoint,
    }
    models = [("--reference-load", path) for path in config.reference.reference_load]
    for flag, path in [*read.items(), *models]:
        if belongs_to(path, flags.save):
            raise ConfigError(
                f"{OVERWRITE} would remove {path}, which {flag} reads. Omit {OVERWRITE}, or choose another --save."
            )


def _plan(flags: CheckpointConfig) -> Start:
    if flags.load is not None and Path(flags.load).exists() and not Path(flags.load).is_dir():
        raise ConfigError(f"--load {flags.load} is a file. Specify the --save directory of a run.")
    if flags.save is not None and is_published(flags.save):
        raise ConfigError(f"--save {flags.save} contains a published model. Choose another directory for the run.")
    if flags.load is not None and belongs_to(flags.load, flags.save):
        return _plan_in_save(flags, flags.load)
    origin = outside_origin(flags)
    if flags.save is not None and holds_checkpoints(Path(flags.save)):
        return _plan_occupied(flags, flags.save, origin)
    return _plan_from(flags, origin)


def _plan_evaluation(flags: CheckpointConfig) -> Start:
    """Return the checkpoint to evaluate: that of --load, or the run in --save if it continues --load.

    If --save contains another run or none, it is not changed.
    """
    origin, record = outside_origin(flags), read_record(Path(flags.save)) if flags.save is not None else None
    continues = origin is None and not flags.finetune
    is_same = origin is not None and record is not None and record.origin == origin
    ignores_save = not (continues or is_same)
    start = _plan(replace(flags, save=None) if ignores_save else flags)
    if start.checkpoint is None:
        raise ConfigError(f"--skip-train evaluates a checkpoint, but --load {flags.load} contains none.")
    return replace(start, trains=False, ignores_save=ignores_save)


def _plan_in_save(flags: CheckpointConfig, load: str) -> Start:
    """Plan a start with --load in --save: the same directory, or a checkpoint in it."""
    if flags.finetune:
        raise ConfigError(
            f"--finetune with --load {load} and --save {flags.save}: the new run would replace its base. Choose "
            "another --save."
        )
    found = _find(load, flags.ckpt_step, "--load")
    record = read_record(Path(flags.save or load))
    if found is not None:
        checkpoint, note = found
        known = record or RunRecord.new(None)
        return Start(checkpoint, record=replace(known, job=slurm_job()), note=note)
    if STEP_DIRECTORY.fullmatch(Path(load).resolve().name):
        raise ConfigError(
            f"--load {load}: not a complete checkpoint ({MANIFEST_FILE}, which is written last, is missing). Use "
            f"--load {flags.save} for the newest step, or add --ckpt-step for another one."
        )
    if flags.exit_on_missing_checkpoint:
        raise ConfigError(f"--load {load}: there is no checkpoint, and --exit-on-missing-checkpoint is set.")
    start = _plan_without_load(flags)
    return replace(start, note=_join(f"--load {load} contains no checkpoint yet", start.note))


def _plan_occupied(flags: CheckpointConfig, save: str, origin: Origin | None) -> Start:
    """Plan a start if --save contains checkpoints and --load is outside of it."""
    record = read_record(Path(save))
    is_same = record is not None and record.origin == origin
    is_requeued = record is not None and slurm_job().is_restart_of(record.job)
    if flags.slm_overwrite_save and not (is_same and is_requeued):
        return replace(_plan_from(flags, origin), overwrites=True)
    if record is not None and is_same and (origin is not None or is_requeued):
        found = _find(save, None, "--save")
        assert found is not None, "--save contains checkpoints"
        started = f"started from {origin.path}" if origin is not None else "started by this job before it was requeued"
        return Start(found[0], record=replace(record, job=slurm_job()), note=_join(started, found[1]))
    started = "" if record is None or record.origin is None else f", started from {record.origin.path}"
    missing = (
        f"--load {flags.load}: there is no such directory. " if flags.load and not Path(flags.load).exists() else ""
    )
    raise ConfigError(
        f"{missing}--save {save} contains another run{started}. To resume it, use --load {save} without --finetune; "
        f"otherwise choose another --save, or remove the run with {OVERWRITE}."
    )


def _plan_from(flags: CheckpointConfig, origin: Origin | None) -> Start:
    """Plan a new run, from its origin or from scratch."""
    record = RunRecord.new(origin)
    if origin is None:
        return Start(record=record)
    path = flags.load if origin.flag == "--load" else flags.pretrained_checkpoint
    assert path is not None, "the origin is one of them"
    if not Path(path).exists():
        remedy = "" if origin.weights_only else f" To save and resume a new run in this directory, add --save {path}."
        raise ConfigError(
            f"{origin.flag} {path}: there is no such directory. Specify the --save directory of an earlier run.{remedy}"
        )
    found = _find(path, origin.step, origin.flag)
    if found is not None:
        return Start(found[0], weights_only=origin.weights_only, record=record, note=found[1])
    if not origin.weights_only and flags.pretrained_checkpoint is not None:
        start = _plan_without_load(flags)
        return replace(start, record=record, note=_join(f"--load {path} contains no checkpoint", start.note))
    raise ConfigError(
        f"{origin.flag} {path}: not a checkpoint (neither {TRACKER} nor {MANIFEST_FILE} exists). Specify the --save "
        "directory of an earlier run."
    )


def _plan_without_load(flags: CheckpointConfig) -> Start:
    """Plan a start from --pretrained-checkpoint, or from scratch."""
    flags = replace(flags, load=None)
    return _plan_from(flags, outside_origin(flags))


def _find(path: str, step: int | None, flag: str) -> tuple[Checkpoint, str] | None:
    """Return the checkpoint of ``step`` or the newest, with a note; None if the directory contains none.

    Raises:
        ConfigError: the step does not exist, or no existing checkpoint is known to be complete.
    """
    root = Path(path)
    foreign = find_foreign(path, step, flag)
    if foreign is not None:
        if step is None and (steps := steps_to_try(root, foreign)):
            return Checkpoint(flag, path, steps[0], steps[1:]), ""
        return Checkpoint(flag, str(foreign.directory), None), ""
    if step is None and (root / MANIFEST_FILE).is_file():
        return Checkpoint(flag, path, None), ""
    if step is not None:
        locate_checkpoint(path, step, flag)
        return Checkpoint(flag, path, step), ""
    choice = choose_step(root, flag)
    return None if choice is None else (Checkpoint(flag, path, choice.step, choice.alternatives), choice.note)


def _join(*notes: str) -> str:
    return "; ".join(filter(None, notes))
