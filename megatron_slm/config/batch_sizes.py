"""Global batch size over a run: constant, or increasing by --rampup-batch-size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_slm.config.schema import TrainingConfig


@dataclass(frozen=True)
class BatchSizes:
    """Represent the global batch size as a function of the consumed samples, as Megatron-LM does.

    It increases from ``start`` to ``final`` in equal increments, each after the same number of samples.
    """

    final: int
    start: int
    increment: int = 1
    ramp_samples: int = 1  # number of samples until the final size

    @staticmethod
    def from_config(training: TrainingConfig) -> BatchSizes:
        """Return the batch sizes of a run with a resolved global batch size."""
        final = training.global_batch_size
        return (
            BatchSizes(final, *training.rampup_batch_size) if training.rampup_batch_size else BatchSizes(final, final)
        )

    @property
    def is_constant(self) -> bool:
        """Return whether all steps have the same batch size."""
        return self.start == self.final

    def at(self, consumed: int) -> int:
        """Return the size of the batch after ``consumed`` samples."""
        if self.is_constant or consumed > self.ramp_samples:
            return self.final
        per_increment = self.ramp_samples / ((self.final - self.start) // self.increment)
        return self.start + int(consumed / per_increment) * self.increment

    def consumed_after(self, steps: int, consumed: int = 0) -> int:
        """Return the number of consumed samples ``steps`` steps after ``consumed`` samples."""
        for first, size, count in self._plateaus(consumed):
            if count is None or steps <= count:
                return first + steps * size
            steps -= count
        raise AssertionError("the last plateau has no end")

    def steps_until(self, limit: int, consumed: int = 0) -> int:
        """Return the number of complete steps between ``consumed`` and ``limit`` samples."""
        steps = 0
        for first, size, count in self._plateaus(consumed):
            fitting = max(limit - first, 0) // size
            if count is None or fitting < count:
                return steps + fitting
            steps += count
        raise AssertionError("the last plateau has no end")

    def _plateaus(self, consumed: int) -> Iterator[tuple[int, int, int | None]]:
        """Yield consumed samples, batch size and number of steps of each run of equal batches; the last is endless."""
        while (size := self.at(consumed)) != self.final:
            samples = range(consumed + size, self.ramp_samples + size + 1, size)  # after each step of this size
            count = 1 + bisect_right(samples, size, key=self.at)
            yield consumed, size, count
            consumed += count * size
        yield consumed, self.final, None


def ramp_violations(training: TrainingConfig) -> Iterator[str]:
    """Yield a message if --rampup-batch-size does not lead to the global batch size."""
    ramp, final = training.rampup_batch_size, training.global_batch_size
    if not ramp:
        return
    flag = f"--rampup-batch-size {' '.join(map(str, ramp))}"
    if len(ramp) != 3 or min(ramp) <= 0:
        yield f"{flag} must be three numbers above 0: initial batch size, increment, and samples of the ramp."
    elif ramp[0] >= final:
        yield f"{flag} starts at {ramp[0]}, which is not below --global-batch-size {final}. Leave it out."
    elif (final - ramp[0]) % ramp[1]:
        yield (
            f"{flag}: increments of {ramp[1]} do not lead from {ramp[0]} to --global-batch-size {final}. Choose a "
            f"divisor of {final - ramp[0]}."
        )
