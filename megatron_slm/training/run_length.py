"""Run length in iterations and samples, for constant and changed global batch sizes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.schema import RunConfig, TrainingConfig

Milestone = tuple[int, int]  # an iteration, and the number of samples consumed after it
START: tuple[Milestone, ...] = ((0, 0),)


@dataclass(frozen=True)
class RunLength:
    """Represent the iterations of a run; those after the last milestone have the batch sizes ``sizes``."""

    iterations: int
    sizes: BatchSizes
    milestones: tuple[Milestone, ...] = START  # ascending: start of the run and its resumes

    @staticmethod
    def from_config(
        config: RunConfig, milestones: Sequence[Milestone] = START, batches: TrainingConfig | None = None
    ) -> RunLength:
        """Return the length of a run that continues after the last milestone.

        Args:
            milestones: milestones of the run so far.
            batches: settings whose batch sizes override those of the configuration.
        """
        training = config.training
        sizes = BatchSizes.from_config(batches or training)
        iterations, (step, consumed) = training.train_iters, milestones[-1]
        if training.train_samples is not None:
            iterations = step + sizes.steps_until(training.train_samples, consumed)
        return RunLength(iterations, sizes, tuple(milestones))

    @property
    def samples(self) -> int:
        """Return the total number of samples of the run."""
        return max(self.samples_at(self.iterations), self.milestones[-1][1])

    def samples_at(self, iteration: int) -> int:
        """Return the number of samples consumed after a past or future ``iteration``."""
        step, consumed = self.milestones[-1]
        if iteration >= step:
            return self.sizes.consumed_after(iteration - step, consumed)
        place = bisect_right(self.milestones, iteration, key=lambda milestone: milestone[0])
        (first, start), (last, stop) = self.milestones[place - 1 : place + 1]
        if self.sizes.consumed_after(last - first, start) == stop:  # with the present batch sizes
            return self.sizes.consumed_after(iteration - first, start)
        return start + (stop - start) * (iteration - first) // (last - first)


@dataclass(frozen=True)
class ScheduleLength:
    """Represent the lengths of the schedule's phases in samples."""

    warmup: int
    decay: int
    wsd_decay: int | None
    weight_decay: int

    @staticmethod
    def from_config(config: RunConfig, length: RunLength) -> ScheduleLength:
        """Return the phases of the flags, given in iterations, or in samples with --train-samples."""
        settings = config.optimizer
        if config.training.train_samples is not None:
            total = config.training.train_samples
            decay = settings.lr_decay_samples or total
            warmup, wsd = settings.lr_warmup_samples, settings.lr_wsd_decay_samples
        else:
            total, iterations = length.samples, settings.lr_decay_iters or length.iterations
            decay = length.samples_at(iterations)
            warmup, wsd = length.samples_at(settings.lr_warmup_iters), None
            if settings.lr_wsd_decay_iters is not None:
                wsd = decay - length.samples_at(iterations - settings.lr_wsd_decay_iters)
        if settings.lr_warmup_fraction is not None:
            warmup = int(settings.lr_warmup_fraction * decay)
        return ScheduleLength(warmup, decay, wsd, total)
