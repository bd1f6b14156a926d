"""Test that the benchmark of pipeline bubbles runs, and that bubbles reduce the reference model's overhead."""

from __future__ import annotations

import pytest

from megatron_slm.testing.ranks import run_ranks

pytestmark = pytest.mark.slow


def test_bubbles_reduce_the_overhead() -> None:
    from benchmark_bubbles import measure

    row = run_ranks(measure, 2, 4, 0.1, 1.0, 1.0, 2, initialize=False)[0]
    assert row["plan"] == [(2, 2, 4), (0, 2, 4)]
    assert row["overhead"]["in bubbles"] < row["overhead"]["separate pass"]
