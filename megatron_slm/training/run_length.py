"""Length of a run in iterations and in samples, also if the global batch changed when it was resumed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.config.schema import Config

Milestone = tuple[int, int]  # an iteration, and the samples that were consumed after it
START: tuple[Milestone, ...] = ((0, 0),)


@dataclass(frozen=True)
class RunLength:
    """Iterations of a run: those after the last milestone take ``batch`` samples each."""

    iterations: int
    batch: int
    milestones: tuple[Milestone, ...] = START  # rising; the start, and where the run was resumed

    @staticmethod
    def of(config: Config, milestones: Sequence[Milestone] = START, batch: int | None = None) -> RunLength:
        """Return the length of a run that continues after the last milestone.

        Args:
            milestones: of the run so far.
            batch: replaces --global-batch-size.
        """
        training = config.training
        batch = batch or training.global_batch_size
        iterations, (step, consumed) = training.train_iters, milestones[-1]
        if training.train_samples is not None:
            iterations = step + max(training.train_samples - consumed, 0) // batch
        return RunLength(iterations, batch, tuple(milestones))

    @property
    def samples(self) -> int:
        """Samples of the entire run."""
        return max(self.samples_at(self.iterations), self.milestones[-1][1])

    def samples_at(self, iteration: int) -> int:
        """Return the samples that are consumed after ``iteration``, a past or a future one."""
        step, consumed = self.milestones[-1]
        if iteration >= step:
            return consumed + (iteration - step) * self.batch
        (first, begin), (last, end) = next(
            pair for pair in itertools.pairwise(self.milestones) if pair[0][0] <= iteration < pair[1][0]
        )
        return begin + (end - begin) * (iteration - first) // (last - first)


@dataclass(frozen=True)
class ScheduleLength:
    """Lengths of the phases of the schedule, in samples."""

    warmup: int
    decay: int
    wsd_decay: int | None
    weight_decay: int

    @staticmethod
    def of(config: Config, length: RunLength) -> ScheduleLength:
        """Return the phases that the flags describe, in iterations or with --train-samples in samples."""
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
