"""Random states of a run that starts: which ranks share them."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_slm.runtime import process
from megatron_slm.runtime.groups import ParallelLayout
from megatron_slm.testing.ranks import run_ranks


def _first_random_numbers(rank: int, world_size: int, layout: ParallelLayout) -> tuple[float, float]:
    process.start(layout)
    try:
        shared = torch.rand(1).item()
        with get_cuda_rng_tracker().fork():
            return shared, torch.rand(1).item()
    finally:
        process.stop()


@pytest.mark.parametrize(
    ("layout", "numbers"),
    [
        (ParallelLayout(), (1, 1)),
        (ParallelLayout(tensor=2), (1, 2)),
        (ParallelLayout(pipeline=2), (2, 2)),
    ],
    ids=["data", "tensor", "pipeline"],
)
def test_random_states_differ_between_stages_and_tensor_parallel_ranks(
    layout: ParallelLayout, numbers: tuple[int, int]
) -> None:
    """Data-parallel ranks begin with the same weights, and pipeline stages with different ones."""
    drawn = run_ranks(_first_random_numbers, 2, layout, initialise=False)
    assert tuple(len(set(column)) for column in zip(*drawn, strict=True)) == numbers
