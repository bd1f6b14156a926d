"""Test that runs with a filtered backward pass agree in every layout, and that k = 1 is CLM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_slm.config.schema import RunConfig
from megatron_slm.testing.ranks import run_ranks, shared_process_group
from megatron_slm.testing.tiny import captured, command, launch, losses, make_corpus, records
from megatron_slm.training import optimizer

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
    launch(filtered(directory, name, **flags), ranks)
    return records(directory / name)


def filtered(directory: Path, name: str, **flags: Any) -> list[str]:
    """Return the command line of :func:`run`."""
    settings = {"objective": "slm", "slm_score": "token-loss", "slm_backward": "filtered", **flags}
    start = {"load": directory / "base", "finetune": True, "train_iters": 3, "losses_only": True}
    return command(str(directory / "corpus_text_document"), directory / name, **{**start, **settings})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_one_process(workspace: Path, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    assert_equal(records(workspace / "one"), run(workspace, layout, ranks, **flags))


def test_ranks_that_share_a_query_group_agree_with_one_process(workspace: Path) -> None:
    """Two ranks have the queries of the same keys and values."""
    base, shared = workspace / "base-of-one-group", {"num_query_groups": 1, "num_layers": 2}
    launch(command(str(workspace / "corpus_text_document"), base, train_iters=1, eval_iters=0, **shared))
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    one = run(workspace, "one-group", load=base, **shared)
    assert_equal(one, run(workspace, "one-group-tp2", 2, load=base, **shared, **layout))


def assert_equal(one: list[dict[str, Any]], many: list[dict[str, Any]]) -> None:
    """Assert that runs in two layouts have the same selections, and equal figures up to rounding."""
    for first, second in zip(one, many, strict=True):
        for figure in ("loss", "loss_all", "threshold", "grad_norm"):
            assert second[figure] == pytest.approx(first[figure], rel=2e-4), figure
        assert second["selection"] == first["selection"]


def test_filtered_differs_from_exact_below_k_1_only(workspace: Path) -> None:
    def norms(name: str, **flags: Any) -> list[float]:
        return [step["grad_norm"] for step in run(workspace, name, **flags)]

    filtered = [step["grad_norm"] for step in records(workspace / "one")]
    assert norms("exact", slm_backward="exact") != filtered
    both = [norms(f"{name}-all", slm_backward=name, slm_selection_ratio=1) for name in ("exact", "filtered")]
    assert both[0] == both[1]


def _run_with_small_buckets(rank: int, world_size: int, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run the trainer with a bucket for each parameter, as large models have."""
    settings = optimizer.data_parallel_config

    def with_small_buckets(config: RunConfig) -> Any:
        return replace(settings(config), bucket_size=1)

    with shared_process_group(), mock.patch.object(optimizer, "data_parallel_config", with_small_buckets):
        outcomes = [captured(argv) for argv in commands]
    return [(outcome.code, outcome.errors) for outcome in outcomes]


def test_overlapped_gathers_are_complete_before_weights_are_used(workspace: Path) -> None:
    shared = {"dp": 2, "use_distributed_optimizer": True, "overlap_grad_reduce": True}
    commands = [
        filtered(workspace, "reduced", **shared),
        filtered(workspace, "gathered", **shared, overlap_param_gather=True),
    ]
    for outcomes in run_ranks(_run_with_small_buckets, 2, commands, initialize=False):
        assert [errors for code, errors in outcomes if code] == []
    assert losses(workspace / "gathered") == losses(workspace / "reduced")
