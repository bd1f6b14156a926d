"""Random states of a run that starts: which ranks share them."""

from __future__ import annotations

import os

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


@pytest.mark.parametrize(
    ("layout", "given", "expected"),
    [
        (ParallelLayout(), None, None),
        (ParallelLayout(pipeline=2), None, None),
        (ParallelLayout(tensor=2), None, "1"),
        (ParallelLayout(context=2), None, "1"),
        (ParallelLayout(tensor=2), "32", "32"),
    ],
)
def test_kernels_are_ordered_for_tensor_and_context_parallelism(
    monkeypatch: pytest.MonkeyPatch, layout: ParallelLayout, given: str | None, expected: str | None
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    process.order_kernels(layout)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected
