"""Resume the learning-rate and weight-decay schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_slm.runtime.errors import ConfigError

UNSAVED = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")  # settings that Megatron-Core does not save
PER_GROUP = ("max_lr", "min_lr")  # settings that parameter groups override
UNITS = {"lr_warmup_steps", "lr_decay_steps", "wd_incr_steps", "wsd_decay_steps"}


def schedule_state(scheduler: OptimizerParamScheduler) -> dict[str, Any]:
    """Return the state and all settings of the schedule."""
    return {**scheduler.state_dict(), **{name: getattr(scheduler, name) for name in UNSAVED}}


def resume_schedule(
    scheduler: OptimizerParamScheduler, saved: dict[str, Any] | None, consumed_samples: int, directory: Path, flag: str
) -> None:
    """Continue at the saved position with the settings of the flags or the checkpoint.

    Args:
        saved: :func:`schedule_state` of the checkpoint. If None, the configured schedule continues after the
            checkpoint's consumed samples.
        directory: checkpoint directory, for error messages.
        flag: flag that names the checkpoint, for error messages.

    Raises:
        ConfigError: the settings differ, and no flag chooses between them.
    """
    scheduler.num_steps = consumed_samples if saved is None else saved["num_steps"]
    if saved is not None:
        differences = _differences(schedule_state(scheduler), saved)
        if scheduler.use_checkpoint_opt_param_scheduler:
            _adopt(scheduler, {name: theirs for name, (_, theirs) in differences.items()})
        elif differences and not scheduler.override_opt_param_scheduler:
            shown = ", ".join(f"{_name(key)} {ours} (checkpoint: {old})" for key, (ours, old) in differences.items())
            raise ConfigError(
                f"{flag}: the configured schedule differs from that of {directory}: {shown}. Use the same --lr, "
                "--min-lr, --lr-decay-*, --lr-warmup-*, --global-batch-size and --train-iters, or choose a schedule "
                "with --override-opt_param-scheduler (the configured one) or --use-checkpoint-opt_param-scheduler "
                "(the checkpoint's)."
            )
    scheduler.step(0)


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the differing settings that have an effect, as (configured, checkpoint) values by name."""
    ignored = {"num_steps"}
    if ours["lr_decay_style"] == theirs["lr_decay_style"]:
        if ours["lr_decay_style"] == "constant":
            ignored |= {"lr_decay_steps", "min_lr"}
        if ours["lr_decay_style"] != "WSD":
            ignored |= {"wsd_decay_steps", "lr_wsd_decay_style"}
    if ours["lr_warmup_steps"] == theirs["lr_warmup_steps"] == 0:
        ignored |= {"init_lr"}
    if ours["wd_incr_style"] == theirs["wd_incr_style"] == "constant":
        ignored |= {"wd_incr_steps"}
    return {
        name: (ours[name], value)
        for name, value in theirs.items()
        if name in ours and name not in ignored and ours[name] != value
    }


def _adopt(scheduler: OptimizerParamScheduler, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(scheduler, name, value)
    for group in scheduler.optimizer.param_groups:
        group.update({name: settings[name] for name in PER_GROUP if name in settings})


def _name(key: str) -> str:
    return f"{key} (in samples)" if key in UNITS else key
