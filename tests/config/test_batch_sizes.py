"""Batch-size ramp: equal to Megatron-Core's, and the conversion between steps and samples."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
from test_checks import run_check

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.checks import resolve
from megatron_slm.config.flags import parse
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.training.run_length import RunLength, ScheduleLength

RNG = random.Random(0)
RAMPS = [(RNG.randint(1, 9), RNG.randint(1, 6), RNG.randint(1, 12), RNG.randint(1, 300)) for _ in range(60)]
RAMP = BatchSizes(final=16, start=4, increment=4, ramp_samples=30)  # 4 4 4 8 12 16 ...


def test_sizes_are_those_of_megatron_core() -> None:
    for start, increment, count, samples in RAMPS:
        final = start + count * increment
        theirs = RampupBatchsizeNumMicroBatchesCalculator(final, 1, 1, False, 1, start, increment, samples)
        ours = BatchSizes(final, start, increment, samples)
        for consumed in range(samples + 20):
            theirs.update(consumed, consistency_check=True)
            assert ours.at(consumed) == theirs.get_current_global_batch_size(), (ours, consumed)


def test_steps_and_samples() -> None:
    for start, increment, count, ramp in RAMPS:
        sizes, consumed = BatchSizes(start + count * increment, start, increment, ramp), RNG.randint(0, 40)
        samples = list(accumulate(range(100), lambda seen, _, sizes=sizes: seen + sizes.at(seen), initial=consumed))
        for steps in (0, 1, 2, 5, 50, 100):
            assert sizes.consumed_after(steps, consumed) == samples[steps]
        limit = RNG.randint(0, samples[-1])
        assert sizes.steps_until(limit, consumed) == max(
            (i for i, seen in enumerate(samples) if seen <= limit), default=0
        )
    assert BatchSizes(8, 8).consumed_after(5, 3) == 43 and BatchSizes(8, 8).steps_until(43, 3) == 5


def test_length_of_a_run_with_a_ramp() -> None:
    argv = ["--train-samples", "100", "--lr-warmup-samples", "10", "--rampup-batch-size", "4", "4", "30"]
    config = resolve(parse([*MODEL, *argv]).config, 1)
    assert config.training.train_iters == 9  # 3 x 4, 8, 12 and 4 x 16 of 100 samples
    assert RunLength.from_config(config).samples == 96
    assert ScheduleLength.from_config(config, RunLength.from_config(config)) == ScheduleLength(10, 100, None, 100)


def test_schedule_in_steps_is_unchanged_by_resumes() -> None:
    argv = ["--train-iters", "12", "--lr-warmup-iters", "4", "--rampup-batch-size", "4", "4", "30"]
    config = resolve(parse([*MODEL, *argv]).config, 1)
    phases = ScheduleLength.from_config(config, RunLength.from_config(config))
    assert phases == ScheduleLength(20, RAMP.consumed_after(12), None, RAMP.consumed_after(12))
    for step in range(1, 12):
        milestones = [(0, 0), (step, RAMP.consumed_after(step))]
        assert ScheduleLength.from_config(config, RunLength.from_config(config, milestones)) == phases


MODEL = [
    *("--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1", "--seq-length", "8", "--lr", "1e-3"),
    *("--tokenizer-type", "ByteTokenizer", "--mock-data", "--micro-batch-size", "2", "--global-batch-size", "16"),
]


@pytest.mark.parametrize(
    ("ramp", "changes", "message"),
    [
        ([4, 4], {}, "--rampup-batch-size 4 4 must be three numbers above 0"),
        ([4, 0, 30], {}, "--rampup-batch-size 4 0 30 must be three numbers above 0"),
        ([16, 4, 30], {}, "starts at 16, which is not below --global-batch-size 16"),
        ([4, 5, 30], {}, "increments of 5 do not lead from 4 to --global-batch-size 16. Choose a divisor of 12"),
        ([3, 1, 30], {}, "the start of --rampup-batch-size, 3, is not a multiple of --micro-batch-size 2"),
        ([4, 3, 30], {}, "the increment of --rampup-batch-size, 3, is not a multiple of --micro-batch-size 2"),
        ([4, 4, 30], {"train_iters": None, "train_samples": 3}, "less than the initial batch size 4, one step"),
        ([4, 4, 30], {"train_samples": 100}, "--train-iters and --train-samples were both given"),
    ],
)
def test_wrong_ramps_are_refused(ramp: list[int], changes: dict[str, Any], message: str) -> None:
    base = {"micro_batch_size": 2, "global_batch_size": 16, "rampup_batch_size": ramp}
    with pytest.raises(ConfigError) as caught:
        run_check(1, **base, **changes)
    assert message in str(caught.value)
