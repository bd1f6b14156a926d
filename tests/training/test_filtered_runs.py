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
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a corpus, a base model, and the run of one process."""
    directory = tmp_path_factory.mktemp("filtered")
    launch(command(make_corpus(directory / "corpus", 1), directory / "base", train_iters=2, eval_iters=0))
    run(directory, "one")
    return directory


def run(directory: Path, name: str, ranks: int = 1, **flags: Any) -> list[dict[str, Any]]:
    """Train three steps from the base with SLM; return the records of the steps."""
    settings = {"objective": "slm", "slm_score": "token-loss", "slm_backward": "filtered", **flags}
    start = {"load": directory / "base", "finetune": True, "train_iters": 3, "losses_only": True}
    launch(command(str(directory / "corpus_text_document"), directory / name, **start, **settings), ranks)
    return records(directory / name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_one_process(workspace: Path, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    for one, many in zip(records(workspace / "one"), run(workspace, layout, ranks, **flags), strict=True):
        for figure in ("loss", "loss_all", "threshold", "grad_norm"):
            assert many[figure] == pytest.approx(one[figure], rel=2e-4), figure
        assert many["selection"] == one["selection"]


def test_filtered_differs_from_exact_below_k_1_only(workspace: Path) -> None:
    def norms(name: str, **flags: Any) -> list[float]:
        return [step["grad_norm"] for step in run(workspace, name, **flags)]

    filtered = [step["grad_norm"] for step in records(workspace / "one")]
    assert norms("exact", slm_backward="exact") != filtered
    both = [norms(f"{name}-all", slm_backward=name, slm_selection_ratio=1) for name in ("exact", "filtered")]
    assert both[0] == both[1]
