"""Test that runs with a filtered backward pass agree in every layout, and that k = 1 is CLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.testing.tiny import command, launch, make_corpus, records

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-pp2-sequence": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "pp2-interleaved-recompute": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, **RECOMPUTE},
    ),
    "cp2": (2, {"context_parallel_size": 2}),
    "recompute": (1, RECOMPUTE),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("filtered") / "corpus", 1)


def run(corpus: str, save: Path, ranks: int = 1, **flags: Any) -> list[dict[str, Any]]:
    """Train three steps with SLM; return the records of the steps."""
    settings = {"objective": "slm", "slm_score": "token-loss", "slm_backward": "filtered", **flags}
    launch(command(corpus, save, train_iters=3, **settings), ranks)
    return records(save)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_one_process(corpus: str, tmp_path: Path, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    for one, many in zip(run(corpus, tmp_path / "one"), run(corpus, tmp_path / "many", ranks, **flags), strict=True):
        for figure in ("loss", "loss_all", "threshold", "grad_norm"):
            assert many[figure] == pytest.approx(one[figure], rel=2e-4), figure
        assert many["selection"] == one["selection"]


def test_filtered_differs_from_exact_below_k_1_only(corpus: str, tmp_path: Path) -> None:
    for ratio in (0.5, 1.0):
        norms = {
            backward: [
                step["grad_norm"]
                for step in run(
                    corpus, tmp_path / f"{backward}-{ratio}", slm_backward=backward, slm_selection_ratio=ratio
                )
            ]
            for backward in ("exact", "filtered")
        }
        assert (norms["exact"] == norms["filtered"]) == (ratio == 1.0)
