"""Test the comparison of filtered with exact gradients on a tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_filtered_gradient
import pytest

from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, make_corpus


def _main(rank: int, world_size: int, argv: list[str]) -> int:
    return benchmark_filtered_gradient.main(argv)


@pytest.mark.parametrize(("ratio", "exact"), [("0.5", False), ("1", True)])
def test_all_selected_tokens_give_the_exact_gradient(tmp_path: Path, ratio: str, exact: bool) -> None:
    corpus, output = make_corpus(tmp_path / "corpus", 1), tmp_path / "gradient.json"
    flags = command(corpus, objective="slm", slm_score="token-loss", slm_selection_ratio=ratio)
    flags += ["--train-iters", "2", "--lr-warmup-iters", "1"]
    assert run_ranks(_main, 1, ["--every", "1", "--output", str(output), *flags], initialize=False) == [0]
    steps = json.loads(output.read_text(encoding="utf-8"))["steps"]
    assert [step["lr"] for step in steps] == [0, 1e-2], "the schedule does not advance"
    cosines = [step["cosine"] for step in steps]
    assert len(cosines) == 2
    assert all(cosine == pytest.approx(1, abs=1e-12) for cosine in cosines) == exact
