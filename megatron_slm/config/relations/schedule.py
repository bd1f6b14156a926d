"""Relations of the learning-rate and weight-decay schedules."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.relations.wording import both_given
from megatron_slm.config.schema import RunConfig


def learning_rates(config: RunConfig, _: int) -> Iterator[str]:
    """Refuse learning rates above the peak."""
    optimizer = config.optimizer
    peak = optimizer.lr or 0.0
    for flag, value in (("--min-lr", optimizer.min_lr), ("--lr-warmup-init", optimizer.lr_warmup_init)):
        if value > peak:
            yield f"{flag} {value} is above --lr {peak}."


def warmup(config: RunConfig, _: int) -> Iterator[str]:
    """Require one setting of the warm-up, which ends before the schedule."""
    optimizer, steps = config.optimizer, schedule_steps(config)
    has_fraction = optimizer.lr_warmup_fraction is not None
    for flag, value in (
        ("--lr-warmup-iters", optimizer.lr_warmup_iters),
        ("--lr-warmup-samples", optimizer.lr_warmup_samples),
    ):
        yield from both_given(flag, value > 0, "--lr-warmup-fraction", has_fraction)
    if optimizer.lr_warmup_iters >= steps > 0:
        yield f"--lr-warmup-iters {optimizer.lr_warmup_iters} is not below the {steps} steps of the schedule."


def wsd(config: RunConfig, _: int) -> Iterator[str]:
    """Require an annealing phase of WSD that fits into the schedule."""
    optimizer, steps = config.optimizer, schedule_steps(config)
    decay = optimizer.lr_wsd_decay_iters
    unit = "iters" if config.training.train_samples is None else "samples"
    if optimizer.lr_decay_style != "WSD":
        for flag, value in (
            ("--lr-wsd-decay-iters", decay),
            ("--lr-wsd-decay-samples", optimizer.lr_wsd_decay_samples),
        ):
            if value is not None:
                yield f"{flag} has no effect without --lr-decay-style WSD."
    elif decay is None and optimizer.lr_wsd_decay_samples is None:
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}."
    elif decay is not None and decay > steps:
        yield (
            f"--lr-wsd-decay-iters {decay} is more than the {steps} steps of the schedule "
            "(--lr-decay-iters, or --train-iters without it)."
        )


def weight_decay(config: RunConfig, _: int) -> Iterator[str]:
    """Require both start and end of the weight decay, in ascending order."""
    optimizer = config.optimizer
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    style = optimizer.weight_decay_incr_style
    if (start is None) != (end is None):
        yield "--start-weight-decay and --end-weight-decay must be given together. Give both or neither."
    if start is None or end is None:
        if style != "constant":
            yield f"--weight-decay-incr-style {style} needs --start-weight-decay and --end-weight-decay."
    elif end < start:
        yield (
            f"--end-weight-decay {end} is below --start-weight-decay {start}: Megatron-Core only increases weight "
            "decay. Increase the end or decrease the start."
        )
    elif style == "constant" and start != end:
        yield (
            f"--start-weight-decay {start} and --end-weight-decay {end} differ, and --weight-decay-incr-style is "
            "constant. Choose linear or cosine, or equal values."
        )


def scheduler_source(config: RunConfig, _: int) -> Iterator[str]:
    """Require one source for the schedule of a resumed run."""
    optimizer = config.optimizer
    yield from both_given(
        "--override-opt_param-scheduler",
        optimizer.override_opt_param_scheduler,
        "--use-checkpoint-opt_param-scheduler",
        optimizer.use_checkpoint_opt_param_scheduler,
        ": the schedule of the flags, or that of the checkpoint",
    )


def units(config: RunConfig, _: int) -> Iterator[str]:
    """Require one unit for the run and its schedule, iterations or samples."""
    training, optimizer = config.training, config.optimizer
    in_iterations = {
        "--lr-decay-iters": optimizer.lr_decay_iters,
        "--lr-warmup-iters": optimizer.lr_warmup_iters,
        "--lr-wsd-decay-iters": optimizer.lr_wsd_decay_iters,
    }
    in_samples = {
        "--lr-decay-samples": optimizer.lr_decay_samples,
        "--lr-warmup-samples": optimizer.lr_warmup_samples,
        "--lr-wsd-decay-samples": optimizer.lr_wsd_decay_samples,
    }
    if training.train_samples is None:
        for flag, value in in_samples.items():
            if value:
                yield f"{flag} needs --train-samples. With --train-iters, give {flag.replace('samples', 'iters')}."
        return
    for flag, value in in_iterations.items():
        if value:
            yield f"{flag} needs --train-iters. With --train-samples, give {flag.replace('iters', 'samples')}."
    total, sizes = training.train_samples, BatchSizes.from_config(training)
    if total < sizes.start:
        flag = "--global-batch-size" if sizes.is_constant else "the initial batch size"
        yield f"--train-samples {total} is less than {flag} {sizes.start}, one step."
    elif training.train_iters != sizes.steps_until(total):
        yield "--train-iters and --train-samples were both given. Give one."
    decay = optimizer.lr_decay_samples or total
    if optimizer.lr_warmup_samples >= decay:
        yield f"--lr-warmup-samples {optimizer.lr_warmup_samples} is not below the {decay} samples of the schedule."
    wsd_decay = optimizer.lr_wsd_decay_samples or 0
    if wsd_decay > decay:
        yield f"--lr-wsd-decay-samples {wsd_decay} is more than the {decay} samples of the schedule."


def schedule_steps(config: RunConfig) -> int:
    """Return the number of iterations of the learning-rate schedule."""
    return config.optimizer.lr_decay_iters or config.training.train_iters


RELATIONS = (learning_rates, units, warmup, wsd, weight_decay, scheduler_source)
