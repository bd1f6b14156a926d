"""Resuming the schedule of learning rate and weight decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_slm.runtime.errors import ConfigError

FURTHER = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")  # settings that Megatron-Core does not save
PER_GROUP = ("max_lr", "min_lr")  # settings that parameter groups hold too, and that win there
UNITS = {"lr_warmup_steps", "lr_decay_steps", "wd_incr_steps", "wsd_decay_steps"}


def schedule_state(scheduler: OptimizerParamScheduler) -> dict[str, Any]:
    """Return the state of the schedule, and all of its settings."""
    return {**scheduler.state_dict(), **{name: getattr(scheduler, name) for name in FURTHER}}


def resume_schedule(
    scheduler: OptimizerParamScheduler, saved: dict[str, Any] | None, consumed_samples: int, directory: Path, flag: str
) -> None:
    """Continue at the saved position, with the settings of the flags or those of the checkpoint.

    Args:
        saved: :func:`schedule_state` of the checkpoint; None if it is not loaded: then the flags' schedule continues
            after the samples that the checkpoint has consumed.
        directory: the checkpoint, and ``flag`` the flag that named it, for error messages.

    Raises:
        ConfigError: the settings differ, and no flag decides between them.
    """
    scheduler.num_steps = consumed_samples if saved is None else saved["num_steps"]
    if saved is not None:
        differences = _differences(schedule_state(scheduler), saved)
        if scheduler.use_checkpoint_opt_param_scheduler:
            _adopt(scheduler, {name: theirs for name, (_, theirs) in differences.items()})
        elif differences and not scheduler.override_opt_param_scheduler:
            shown = ", ".join(f"{_name(key)} {ours} (checkpoint: {old})" for key, (ours, old) in differences.items())
            raise ConfigError(
                f"{flag}: the schedule of the flags is not that of {directory}: {shown}. Give the same --lr, --min-lr, "
                "--lr-decay-*, --lr-warmup-*, --global-batch-size and --train-iters, or choose one with "
                "--override-opt_param-scheduler (the flags') or --use-checkpoint-opt_param-scheduler (the "
                "checkpoint's)."
            )
    scheduler.step(0)


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ and have an effect: (of the flags, of the checkpoint)."""
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
