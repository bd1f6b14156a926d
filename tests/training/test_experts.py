"""Test mixture-of-experts models: auxiliary losses are equal to CLM's, and layouts agree."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_slm.cli.pretrain import main
from megatron_slm.objective import selective_loss as objective
from megatron_slm.objective.selection import strategies
from megatron_slm.objective.selection.exact import Selection
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, make_corpus, records
from megatron_slm.training import step as step_module
from megatron_slm.training.state import TrainState

pytestmark = pytest.mark.slow

EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_aux_loss_coeff": 0.1}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    corpus = make_corpus(directory / "corpus", 1)
    launch(command(corpus, directory / "base", train_iters=2, **EXPERTS))
    launch(command(make_corpus(directory / "clean", 2), directory / "rm", train_iters=3))
    launch(slm(directory, "one"))
    return directory


def slm(directory: Path, name: str, **flags: Any) -> list[str]:
    """Return the command of SLM training of a model with experts; the reference model has none."""
    settings = {"train_iters": 3, "objective": "slm", "reference_load": directory / "rm", **EXPERTS, **flags}
    settings = {"load": directory / "base", "finetune": True, **settings}
    return command(str(directory / "corpus_text_document"), directory / name, **settings)


LAYOUTS = {
    "data": (2, {"dp": 2, "use_distributed_optimizer": True}),
    "expert": (2, {"dp": 2, "expert_model_parallel_size": 2}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "interleaved": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_one_process(workspace: Path, layout: str) -> None:
    """The load-balancing loss is computed per micro-batch and rank, so data parallelism changes gradients slightly."""
    ranks, flags = LAYOUTS[layout]
    launch(slm(workspace, layout, **flags), ranks)
    tolerance = 1e-2 if "dp" in flags else 2e-4
    for one, many in zip(records(workspace / "one"), records(workspace / layout), strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=tolerance)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=10 * tolerance)
        if "dp" not in flags:
            assert many["selection"] == one["selection"]


def _auxiliary_gradients(rank: int, world_size: int, argv: list[str]) -> list[torch.Tensor]:
    """Return the gradients of all routers before the optimizer step, without the token loss."""
    gradients: list[torch.Tensor] = []

    def without_loss(tokens: Any, selection: Any) -> Any:
        loss = selective_loss(tokens, selection)
        return objective.SelectiveLoss(loss.numerator * 0.0, loss.count, loss.selected, loss.threshold)

    def recorded_step(state: TrainState, grad_norm: float) -> Any:
        for chunk in state.model_chunks:
            for name, parameter in chunk.named_parameters():
                if "router" in name:
                    gradients.append(parameter.main_grad.clone())
        return optimizer_step(state, grad_norm)

    selective_loss, optimizer_step = objective.selective_loss, TrainState.optimizer_step
    with (
        mock.patch.object(step_module, "selective_loss", without_loss),
        mock.patch.object(TrainState, "optimizer_step", recorded_step),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        assert main(argv) == 0
    return gradients


def _select_nothing(rank: int, world_size: int, argv: list[str]) -> None:
    def nothing(tokens: Any, selector: Any, ratio: float) -> Selection:
        none = torch.zeros_like(tokens.valid)
        return Selection(none, none.float(), torch.zeros(()))

    with mock.patch.object(strategies, "select", nothing), contextlib.redirect_stdout(io.StringIO()):
        assert main(argv) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_step_without_selected_tokens_does_not_update_experts(workspace: Path, ranks: int) -> None:
    """A predicted threshold may select none if losses suddenly fall by more than their spread."""
    layout = {"dp": ranks, "use_distributed_optimizer": True, "overlap_grad_reduce": True}
    name = f"nothing-{ranks}"
    run_ranks(_select_nothing, ranks, slm(workspace, name, **layout), initialize=False)
    assert [record["grad_norm"] for record in records(workspace / name)] == [0.0] * 3


VARIANTS = {
    "half": ["--objective", "slm", "--slm-score", "token-loss", "--slm-selection-ratio", "0.5"],
    "tenth": ["--objective", "slm", "--slm-score", "token-loss", "--slm-selection-ratio", "0.125"],
    "joined": [
        *("--objective", "slm", "--slm-score", "token-loss:0.5 and random:0.7", "--slm-scope", "global-batch"),
    ],
}


SPLITS = {
    "tensor": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "context": ["--context-parallel-size", "2"],
}


def auxiliary(workspace: Path, balance: str, *more: str, ranks: int = 1) -> list[torch.Tensor]:
    argv = command(
        str(workspace / "corpus_text_document"),
        load=workspace / "base",
        finetune=True,
        train_iters=1,
        eval_iters=0,
        moe_router_load_balancing_type=balance,
        moe_z_loss_coeff=0.01,
        **EXPERTS,
    )
    return run_ranks(_auxiliary_gradients, ranks, [*argv, *more], initialize=False)[0]


@pytest.mark.parametrize("balance", ["aux_loss", "seq_aux_loss"])
def test_auxiliary_losses_are_independent_of_selection_and_splits(workspace: Path, balance: str) -> None:
    clm = auxiliary(workspace, balance)
    assert len(clm) == 4 and all(bool(gradient.abs().max() > 0) for gradient in clm)
    for variant in VARIANTS:
        for expected, got in zip(clm, auxiliary(workspace, balance, *VARIANTS[variant]), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    for split in SPLITS:
        for expected, got in zip(
            clm, auxiliary(workspace, balance, *VARIANTS["half"], *SPLITS[split], ranks=2), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7, msg=f"{split}: {got / expected}")


def test_dispatcher_that_needs_a_gpu(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(slm(workspace, "never", moe_token_dispatcher_type="alltoall")) == 2
    assert "--moe-token-dispatcher-type alltoall needs GPUs" in capsys.readouterr().err


def test_combined_scores_need_global_batch_scope(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = slm(workspace, "never", slm_score="excess and token-loss")
    assert main(argv) == 2
    assert "--slm-scope global-batch" in capsys.readouterr().err


def test_resume_is_bit_for_bit(workspace: Path) -> None:
    flags = {"dp": 2, "expert_model_parallel_size": 2, "use_distributed_optimizer": True, "train_iters": 4}
    launch(slm(workspace, "uninterrupted", **flags), 2)
    start = slm(workspace, "part", **flags, exit_interval=2)
    launch(start, 2)
    start = [str(workspace / "part") if word == str(workspace / "base") else word for word in start]
    start.remove("--finetune")
    launch([*start, "--exit-interval", "100"], 2)
    for one, two in zip(records(workspace / "uninterrupted"), records(workspace / "part"), strict=True):
        assert (one["loss"], one["grad_norm"], one["selection"]) == (two["loss"], two["grad_norm"], two["selection"])
