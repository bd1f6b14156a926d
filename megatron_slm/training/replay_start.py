"""Determine the start of a replay: the newest checkpoint before the step, or the start of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_slm.config.checkpoint_files import MANIFEST_FILE
from megatron_slm.config.checkpoint_steps import step_directories
from megatron_slm.config.schema import CheckpointConfig, RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.training.save_directory import belongs_to, holds_checkpoints, outside_origin, read_record

REPLAY_FLAG = "--replay-step"


def replay_config(config: RunConfig) -> RunConfig:
    """Return the settings of a replay: the newest checkpoint before the step, and no outputs. Reads directories.

    Raises:
        ConfigError: the run has checkpoints, but none before the step.
    """
    assert config.training.replay_step is not None
    checkpoint = replace(_before_step(config.checkpoint, config.training.replay_step), save=None)
    logging = replace(
        config.logging,
        tensorboard_dir=None,
        wandb_project=None,
        slm_log_dir=None,
        slm_metrics_file=None,
        slm_events_file=None,
    )
    return replace(config, checkpoint=replace(checkpoint, slm_overwrite_save=False), logging=logging)


def _before_step(flags: CheckpointConfig, step: int) -> CheckpointConfig:
    """Return the checkpoint settings that start before ``step``."""
    directory = _run_directory(flags)
    if directory is None:
        is_new = belongs_to(flags.load, flags.save)
        return replace(flags, load=None, ckpt_step=None) if is_new else flags
    complete = [number for number, path in step_directories(directory).items() if (path / MANIFEST_FILE).is_file()]
    usable = [number for number in complete if number < step and flags.ckpt_step in (None, number)]
    if not usable:
        chosen = "" if flags.ckpt_step is None else f", but --ckpt-step is {flags.ckpt_step}"
        omitted = "--load and --save" if flags.load is None or belongs_to(flags.load, flags.save) else "--save"
        raise ConfigError(
            f"{REPLAY_FLAG} {step} needs a checkpoint of step {step - 1} or earlier{chosen}; {directory} has the steps "
            f"{', '.join(map(str, complete)) or 'none'}. To repeat the step from the start of the run, leave out "
            f"{omitted}."
        )
    is_save = belongs_to(str(directory), flags.save)
    return replace(
        flags,
        load=str(directory),
        ckpt_step=max(usable),
        finetune=False,
        pretrained_checkpoint=None,
        load_optim=flags.load_optim or (is_save and flags.save_optim),
        load_rng=flags.load_rng or (is_save and flags.save_rng),
    )


def _run_directory(flags: CheckpointConfig) -> Path | None:
    """Return the directory with the checkpoints of the run: --save, or --load unless only its weights are used."""
    if flags.save is not None and holds_checkpoints(Path(flags.save)):
        record, origin = read_record(Path(flags.save)), outside_origin(flags)
        if origin is None or (record is not None and record.origin == origin):
            return Path(flags.save)
    if flags.load is None or flags.finetune or not holds_checkpoints(Path(flags.load)):
        return None
    return Path(flags.load)
