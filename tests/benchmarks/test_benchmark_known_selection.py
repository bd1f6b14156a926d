"""Test that saving selected rows only takes less memory and leaves all gradients equal."""

from __future__ import annotations

import itertools
from pathlib import Path

from megatron_slm.testing.ranks import run_ranks


def _measure(rank: int, world_size: int, directory: Path) -> dict[str, int]:
    from benchmark_known_selection import measure
    from benchmark_training import Bench

    return measure(Bench("tiny", directory, 1))


def test_selected_rows_take_less_memory(tmp_path: Path) -> None:
    [found] = run_ranks(_measure, 1, tmp_path, initialize=False)
    sizes = list(found.values())
    assert len(sizes) == 4 and all(more > less for more, less in itertools.pairwise(sizes)), found
