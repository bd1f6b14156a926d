"""Test multi-token prediction in the trainer: layouts agree, k = 1 equals CLM, and both MTP selections work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.testing.tiny import MODEL, command, launch, make_corpus, records

pytestmark = pytest.mark.slow

HEADS = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("heads")
    launch(command(make_corpus(directory / "corpus", 1), directory / "base", train_iters=2, **HEADS))
    launch(command(make_corpus(directory / "clean", 2), directory / "rm", train_iters=3, **HEADS))
    for selection in ("main", "independent"):
        launch(slm(directory, selection, slm_mtp_selection=selection))
    return directory


def slm(directory: Path, name: str, **flags: Any) -> list[str]:
    settings = {"train_iters": 3, "load": directory / "base", "finetune": True, **HEADS, **flags}
    corpus = str(directory / "corpus_text_document")
    return command(corpus, directory / name, objective="slm", reference_load=directory / "rm", **settings)


LAYOUTS = {
    "data": {"dp": 2, "use_distributed_optimizer": True},
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "interleaved": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
}


@pytest.mark.parametrize(
    ("layout", "selection"), [*((name, "independent") for name in LAYOUTS), ("data", "main"), ("context", "main")]
)
def test_layouts_agree_with_one_process(workspace: Path, layout: str, selection: str) -> None:
    name = f"{layout}-{selection}"
    launch(slm(workspace, name, slm_mtp_selection=selection, **LAYOUTS[layout]), 2)
    assert_same(workspace, selection, name)


def assert_same(directory: Path, name: str, other: str) -> None:
    for one, many in zip(records(directory / name), records(directory / other), strict=True):
        assert many["selection"] == one["selection"]
        for figure in ("loss", "loss_all", "grad_norm"):
            assert many[figure] == pytest.approx(one[figure], rel=2e-4), figure


def test_heads_and_their_selection_change_the_gradient(workspace: Path) -> None:
    launch(slm(workspace, "none", mtp_loss_scaling_factor=0))
    norms = [records(workspace / name)[0]["grad_norm"] for name in ("none", "main", "independent")]
    assert len(set(norms)) == 3
    assert records(workspace / "none")[0]["loss"] == records(workspace / "main")[0]["loss"]


def test_global_batch_and_predicted_scopes(workspace: Path) -> None:
    for name, dp in (("predicted-1", 1), ("predicted-2", 2)):
        launch(slm(workspace, name, dp=dp, slm_scope="global-batch", slm_threshold="predicted"), dp)
    assert_same(workspace, "predicted-1", "predicted-2")


def test_tied_embedding_agrees(workspace: Path) -> None:
    """All heads share the embedding weight, which also embeds the MTP tokens, with and without vocabulary shards."""
    model = [word for word in MODEL if word != "--untie-embeddings-and-output-weights"]
    corpus = str(workspace / "corpus_text_document")
    flags = {"model": model, "train_iters": 3, "objective": "slm", "slm_score": "token-loss", **HEADS}
    launch(command(corpus, workspace / "tied-base", **flags))
    flags |= {"load": workspace / "tied-base", "finetune": True}
    launch(command(corpus, workspace / "tied-torch", **flags, slm_cross_entropy="torch"))
    launch(command(corpus, workspace / "tied-one", **flags))
    launch(command(corpus, workspace / "tied-tp", **flags, tensor_model_parallel_size=2), 2)
    for name in ("tied-one", "tied-tp"):
        assert_same(workspace, "tied-torch", name)


def test_everything_selected_is_clm_bit_for_bit(workspace: Path) -> None:
    corpus = str(workspace / "corpus_text_document")
    launch(command(corpus, workspace / "clm", train_iters=3, load=workspace / "base", finetune=True, **HEADS))
    launch([*slm(workspace, "k1", slm_mtp_selection="independent"), "--slm-selection-ratio", "1.0"])
    for clm, k1 in zip(records(workspace / "clm"), records(workspace / "k1"), strict=True):
        assert (clm["loss"], clm["grad_norm"]) == (k1["loss"], k1["grad_norm"])
