"""Test that selections of the global-batch scope are independent of splits, for exact and predicted thresholds."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.objective.linear_cross_entropy import chunked
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import GLOBAL_BATCH, command, launch, launch_each, losses, make_corpus, records

PREDICTED_STEPS = 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a base model, a reference model, and a run whose micro-batch is the global batch."""
    directory = tmp_path_factory.mktemp("global")
    corpus = make_corpus(directory / "corpus", 1)
    clean = make_corpus(directory / "clean", 2)
    launch_each(
        [
            command(corpus, directory / "base", train_iters=2, eval_iters=0),
            command(clean, directory / "rm", train_iters=50, eval_iters=0),
            slm(directory, "single", GLOBAL_BATCH, slm_scope="data-parallel"),
            slm(directory, "predicted", slm_threshold="predicted", train_iters=PREDICTED_STEPS),
        ]
    )
    return directory


def slm(directory: Path, name: str, micro: int = 8, dp: int = 1, **flags: Any) -> list[str]:
    settings = {"slm_scope": "global-batch", "train_iters": 3, "load": directory / "base", "eval_iters": 0, **flags}
    is_resumed = settings["load"] == directory / name
    settings |= {} if is_resumed else {"finetune": True, "losses_only": True}
    corpus = str(directory / "corpus_text_document")
    argv = command(corpus, directory / name, dp=dp, objective="slm", reference_load=directory / "rm", **settings)
    return [*argv, "--micro-batch-size", str(micro)]


def assert_same(directory: Path, name: str, other: str) -> None:
    one, many = records(directory / name), records(directory / other)
    assert len(one) == len(many) > 2
    for a, b in zip(one, many, strict=True):
        assert a["selection"] == b["selection"], "another set of tokens was selected"
        assert a["share_selected"] == b["share_selected"]
        for figure in ("loss", "loss_all", "threshold", "grad_norm"):
            assert b[figure] == pytest.approx(a[figure], rel=2e-4, abs=2e-5), figure


CUTS = {
    "micro-batches": (1, {"micro": 2}),
    "data-parallel": (2, {"micro": 4, "dp": 2, "overlap_grad_reduce": True, "use_distributed_optimizer": True}),
    "tensor": (2, {"tensor_model_parallel_size": 2}),
    "pipeline": (2, {"micro": 4, "pipeline_model_parallel_size": 2}),
    "context": (2, {"micro": 4, "context_parallel_size": 2}),
    # more micro-batches than stages, so that activations and gradients are exchanged at the same time
    "interleaved": (2, {"micro": 2, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
}


@pytest.mark.parametrize("cut", CUTS)
def test_selection_is_independent_of_splits(workspace: Path, cut: str) -> None:
    ranks, flags = CUTS[cut]
    launch(slm(workspace, cut, **flags), ranks)
    assert_same(workspace, "single", cut)
    assert all(record["seconds_ranking"] > 0 for record in records(workspace / cut))


@pytest.mark.parametrize("cut", ["data-parallel", "tensor", "context", "interleaved"])
def test_predicted_threshold_is_independent_of_splits(workspace: Path, cut: str) -> None:
    ranks, flags = CUTS[cut]
    flags = {**flags, "train_iters": PREDICTED_STEPS}
    launch(slm(workspace, f"predicted-{cut}", slm_threshold="predicted", **flags), ranks)
    assert_same(workspace, "predicted", f"predicted-{cut}")
    ranked = [record["seconds_ranking"] is not None for record in records(workspace / f"predicted-{cut}")]
    assert ranked == [True] + [False] * (PREDICTED_STEPS - 1), "only the first step ranks before its backward pass"


def test_ranking_pass_has_the_dropout_of_the_step(workspace: Path) -> None:
    """With one micro-batch, both scopes select the same tokens if the two forward passes have equal losses."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    scopes = ("data-parallel", "global-batch")
    launch_each([slm(workspace, f"dropout-{scope}", GLOBAL_BATCH, slm_scope=scope, **dropout) for scope in scopes])
    assert_same(workspace, "dropout-data-parallel", "dropout-global-batch")


@pytest.mark.parametrize("cut", ["micro-batches", "interleaved", "context"])
def test_gradients_are_computed_in_the_forward_pass(workspace: Path, cut: str) -> None:
    """Exactly the selected tokens have a gradient in the forward pass, for exact and predicted thresholds."""
    ranks, flags = CUTS[cut]
    for threshold in ("exact", "predicted"):
        argv = slm(workspace, f"early-{threshold}-{cut}", slm_threshold=threshold, train_iters=2, **flags)
        for early, late in run_ranks(_count_rows, ranks, argv, initialize=False):
            assert late == 0
            assert early > 0 or "pipeline_model_parallel_size" in flags, "only the last stage has losses"


def test_combined_scores_have_no_gradient_in_the_forward_pass(workspace: Path) -> None:
    joined = slm(workspace, "early-joined", slm_threshold="predicted", slm_score="excess or token-loss:0.2")
    ((early, late),) = run_ranks(_count_rows, 1, joined, initialize=False)
    assert early > 0 and late > 0, "the first step is exact, the others are recomputed"


def _count_rows(rank: int, world_size: int, argv: list[str]) -> tuple[int, int]:
    """Run the trainer; return the rows with gradients in the forward pass, and the rows added in the backward pass."""
    rows = {"early": 0, "late": 0}
    early_pass, accumulate = chunked._forward_grad_pass, chunked._Gradients._accumulate

    def counting_pass(*arguments: Any) -> Any:
        result = early_pass(*arguments)
        rows["early"] += int(result[1].chosen.sum())
        return result

    def counting_accumulate(self: Any, indices: Any, *arguments: Any) -> Any:
        rows["late"] += len(indices)
        return accumulate(self, indices, *arguments)

    chunked._forward_grad_pass, chunked._Gradients._accumulate = counting_pass, counting_accumulate
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(argv) == 0
    return rows["early"], rows["late"]


@pytest.mark.parametrize("score", ["excess", "stochastic-excess"])
def test_everything_selected_is_clm_bit_for_bit(workspace: Path, score: str) -> None:
    corpus = str(workspace / "corpus_text_document")
    base = {"train_iters": 3, "load": workspace / "base", "finetune": True, "losses_only": True}
    clm = f"clm-{score}"
    commands = [command(corpus, workspace / clm, **base)]
    for threshold in ("exact", "predicted"):
        argv = slm(workspace, f"k1-{score}-{threshold}", slm_score=score, slm_threshold=threshold)
        commands.append([*argv, "--slm-selection-ratio", "1.0"])
    launch_each(commands)
    for threshold in ("exact", "predicted"):
        for a, b in zip(records(workspace / clm), records(workspace / f"k1-{score}-{threshold}"), strict=True):
            assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


def test_predicted_threshold_resumes_bit_for_bit(workspace: Path) -> None:
    """This includes ratio warm-up and two pipeline stages, of which only the last has losses."""
    flags = {
        "slm_threshold": "predicted",
        "train_iters": 6,
        "slm_selection_ratio_start": 0.9,
        "slm_selection_ratio_warmup_iters": 5,
        "slm_score": "excess or token-loss:0.2",
        "pipeline_model_parallel_size": 2,
        "num_layers": 2,
    }
    launch(slm(workspace, "unbroken", **{**flags, "load": workspace / "unbroken"}), 2)
    part = slm(workspace, "broken", **{**flags, "load": workspace / "broken"})
    launch([*part, "--exit-interval", "3"], 2)
    launch(part, 2)
    assert losses(workspace / "broken") == losses(workspace / "unbroken")
    assert sum(record["seconds_ranking"] is not None for record in records(workspace / "broken")) == 1


def test_changed_ratio_on_resume_is_selected_exactly(workspace: Path) -> None:
    flags = {"slm_threshold": "predicted", "load": workspace / "ratio", "num_layers": 2}
    longer = slm(workspace, "ratio", **{**flags, "train_iters": 6})
    changed = [*longer, "--slm-selection-ratio", "0.3", "--override-opt_param-scheduler"]
    launch_each([slm(workspace, "ratio", **flags, exit_interval=3), changed])
    steps = records(workspace / "ratio")
    assert [record["seconds_ranking"] is not None for record in steps] == [True, False, False, True, False, False]
    assert steps[3]["share_selected"] == pytest.approx(0.3, abs=0.002)
    assert abs(steps[5]["share_selected"] - 0.3) < abs(steps[5]["share_selected"] - 0.6)


def test_selected_share_is_stable_through_warm_up_and_resume(workspace: Path) -> None:
    """Every 50 steps select the share k, with warm-up and a resume on another corpus."""
    flags = {
        "slm_threshold": "predicted",
        "train_iters": 120,
        "lr_warmup_iters": 30,
        "lr_decay_style": "cosine",
        "load": workspace / "held",
        "micro": GLOBAL_BATCH,
        "num_layers": 1,
        "lr": 1e-3,
    }
    other = slm(workspace, "held", **flags)
    other[other.index("--data-path") + 1] = str(workspace / "clean_text_document")
    launch_each([slm(workspace, "held", **flags, exit_interval=60), other])
    shares = [record["share_selected"] for record in records(workspace / "held")]
    means = [sum(shares[first : first + 50]) / 50 for first in range(1, len(shares) - 49)]
    assert len(shares) == 120 and max(abs(mean - 0.6) for mean in means) <= 0.01
    assert max(abs(share - 0.6) for share in shares[1:]) > 0.005, "shares move from step to step"
