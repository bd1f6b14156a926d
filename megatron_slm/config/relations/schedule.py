"""Relations of the learning-rate and weight-decay schedules."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.relations.wording import both_given
from megatron_slm.config.schema import Config


def learning_rates(config: Config, _: int) -> Iterator[str]:
    """No learning rate of the schedule is above the peak."""
    optimizer = config.optimizer
    peak = optimizer.lr or 0.0
    for flag, value in (("--min-lr", optimizer.min_lr), ("--lr-warmup-init", optimizer.lr_warmup_init)):
        if value > peak:
            yield f"{flag} {value} is above --lr {peak}."


def warmup(config: Config, _: int) -> Iterator[str]:
    """Warm-up is given once and ends before the schedule."""
    optimizer, steps = config.optimizer, schedule_steps(config)
    yield from both_given(
        "--lr-warmup-iters",
        optimizer.lr_warmup_iters > 0,
        "--lr-warmup-fraction",
        optimizer.lr_warmup_fraction is not None,
    )
    if optimizer.lr_warmup_iters >= steps:
        yield f"--lr-warmup-iters {optimizer.lr_warmup_iters} is not below the {steps} steps of the schedule."


def wsd(config: Config, _: int) -> Iterator[str]:
    """The decay phase of WSD fits into the schedule."""
    optimizer, steps = config.optimizer, schedule_steps(config)
    decay = optimizer.lr_wsd_decay_iters
    if optimizer.lr_decay_style != "WSD":
        if decay is not None:
            yield "--lr-wsd-decay-iters has no effect without --lr-decay-style WSD."
    elif decay is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters."
    elif decay > steps:
        yield (
            f"--lr-wsd-decay-iters {decay} is more than the {steps} steps of the schedule "
            "(--lr-decay-iters, or --train-iters without it)."
        )


def weight_decay(config: Config, _: int) -> Iterator[str]:
    """Start and end of the weight decay come together and do not fall."""
    optimizer = config.optimizer
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    style = optimizer.weight_decay_incr_style
    if (start is None) != (end is None):
        yield "--start-weight-decay and --end-weight-decay belong together: give both or none."
    if start is None or end is None:
        if style != "constant":
            yield f"--weight-decay-incr-style {style} needs --start-weight-decay and --end-weight-decay."
    elif end < start:
        yield (
            f"--end-weight-decay {end} is below --start-weight-decay {start}: Megatron-Core only increases weight "
            "decay. Give an end that is not smaller."
        )
    elif style == "constant" and start != end:
        yield (
            f"--start-weight-decay {start} and --end-weight-decay {end} differ, and --weight-decay-incr-style is "
            "constant. Choose linear or cosine, or equal values."
        )


def scheduler_source(config: Config, _: int) -> Iterator[str]:
    """The schedule of a resumed run has one source."""
    optimizer = config.optimizer
    yield from both_given(
        "--override-opt_param-scheduler",
        optimizer.override_opt_param_scheduler,
        "--use-checkpoint-opt_param-scheduler",
        optimizer.use_checkpoint_opt_param_scheduler,
        ": the schedule of the flags, or that of the checkpoint",
    )


def schedule_steps(config: Config) -> int:
    """Return the steps of the learning-rate schedule."""
    return config.optimizer.lr_decay_iters or config.training.train_iters or 0


RELATIONS = (learning_rates, warmup, wsd, weight_decay, scheduler_source)
