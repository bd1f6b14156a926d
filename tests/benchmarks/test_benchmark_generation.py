"""Test that the implementations of the generation benchmark generate the same tokens."""

from __future__ import annotations

from pathlib import Path

from megatron_slm.testing.ranks import run_ranks


def _measure(rank: int, world_size: int, directory: Path) -> dict[str, dict[int, float]]:
    from benchmark_generation import SIZES, measure

    return measure(SIZES["tiny"], (1, 2), 1, directory)


def test_implementations_generate_the_same_tokens(tmp_path: Path) -> None:
    [rates] = run_ranks(_measure, 1, tmp_path, initialize=False)
    assert set(rates) == {"cache", "no cache", "transformers"}
    assert all(rate > 0 for by_batch in rates.values() for rate in by_batch.values())
