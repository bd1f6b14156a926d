"""Test unusual batches and losses in the trainer: a correct result or a clear error."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_slm.cli.pretrain import main
from megatron_slm.data.batches import BatchStream, MicroBatch
from megatron_slm.reference.replica import ReferenceReplica
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, make_corpus, records

VARIANTS = {
    "data-parallel": ["--slm-scope", "data-parallel"],
    "global-batch": ["--slm-scope", "global-batch"],
    "predicted": ["--slm-scope", "global-batch", "--slm-threshold", "predicted"],
}
# Samples without a valid token: the first micro-batch of step 1, rank 1 of two in step 2, and all of step 3.
MASKED = {*range(8), *range(20, 24), *range(28, 32), *range(32, 48)}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("odd")
    launch(command(make_corpus(directory / "corpus", 1), directory / "rm", train_iters=3, num_layers=1))
    return directory


def slm(directory: Path, name: str, dp: int, *more: str, **flags: Any) -> list[str]:
    corpus = str(directory / "corpus_text_document")
    settings = {"objective": "slm", "reference_load": directory / "rm", "train_iters": 4, "num_layers": 1, **flags}
    return [*command(corpus, directory / name, dp=dp, eval_iters=0, **settings), *more]


def _main(rank: int, world_size: int, argv: list[str], masks: bool, losses: dict[str, float]) -> tuple[int, str]:
    """Run the trainer with masked samples, or with changed reference losses of rank 1 in the second step."""
    whole_batch, whole_score = BatchStream._micro_batch, ReferenceReplica.score
    calls = []

    def micro_batch(self: BatchStream, first: int) -> MicroBatch:
        batch = whole_batch(self, first)
        if masks:
            kept = torch.tensor([int(index) not in MASKED for index in batch.sample_index])
            batch.loss_mask.logical_and_(kept[:, None])
        return batch

    def score(self: ReferenceReplica, micro_batches: Any) -> Any:
        scores = whole_score(self, micro_batches)
        calls.append(1)
        if "fault" in losses and rank == 1 and len(calls) == 2:
            scores[1].loss[2, 5] = losses["fault"]
        for reference in scores:
            reference.loss.mul_(losses.get("scale", 1.0)).add_(losses.get("offset", 0.0))
        return scores

    errors = io.StringIO()
    with (
        mock.patch.object(BatchStream, "_micro_batch", micro_batch),
        mock.patch.object(ReferenceReplica, "score", score),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = main(argv)
    return code, errors.getvalue()


def run(argv: list[str], ranks: int, *, masks: bool = False, **losses: float) -> list[tuple[int, str]]:
    return run_ranks(_main, ranks, argv, masks, losses, initialize=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batch_rank_and_step_without_valid_tokens(workspace: Path, variant: str) -> None:
    for dp in (1, 2):
        argv = slm(workspace, f"{variant}-{dp}", dp, *VARIANTS[variant], losses_only=True)
        for code, errors in run(argv, dp, masks=True):
            assert code == 0, errors
    one, two = records(workspace / f"{variant}-1"), records(workspace / f"{variant}-2")
    assert [record["selection"] for record in one] == [record["selection"] for record in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert all(math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]) for record in (a, b))
    assert one[2]["share_selected"] == 0 and one[2]["grad_norm"] == 0
    assert one[3]["share_selected"] > 0.3


@pytest.mark.parametrize(("variant", "fault"), [*((name, math.nan) for name in VARIANTS), ("predicted", math.inf)])
def test_non_finite_loss_ends_the_run_on_every_rank(workspace: Path, variant: str, fault: float) -> None:
    name = f"{variant}-{fault}"
    first, owner = run(slm(workspace, name, 2, *VARIANTS[variant]), 2, fault=fault)
    assert (first[0], owner[0]) == (3, 3)
    place = "step 2: 1 losses are NaN or infinite; the first is on rank 1, sample 30 (micro-batch 1, row 2), position 5"
    assert place in first[1] and f"reference loss {fault}" in first[1] and not owner[1]
    assert not list((workspace / name).glob("iter_*"))
    (event,) = (json.loads(line) for line in (workspace / name / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["ranks"], event["diverged"]) == ("nan_loss", 2, [1], 1)
    assert [(sample["sample"], sample["rank"]) for sample in event["samples"] if sample["diverged"]] == [(30, 1)]
    assert sorted(sample["sample"] for sample in event["samples"]) == list(range(16, 32))
    assert all(sum(span["tokens"] for span in sample["documents"]) == 33 for sample in event["samples"])


@pytest.mark.parametrize("variant", ["global-batch", "predicted"])
def test_ranks_and_micro_batches_without_selected_tokens(workspace: Path, variant: str) -> None:
    """One of 512 tokens is selected."""
    flags = {"slm_selection_ratio": 0.001, "losses_only": True}
    for dp in (1, 2):
        for code, errors in run(slm(workspace, f"few-{variant}-{dp}", dp, *VARIANTS[variant], **flags), dp):
            assert code == 0, errors
    one, two = records(workspace / f"few-{variant}-1"), records(workspace / f"few-{variant}-2")
    assert [record["selection"] for record in one] == [record["selection"] for record in two]
    if variant == "global-batch":
        assert {record["share_selected"] * 512 for record in two} == {1.0}


def test_reference_losses_with_a_large_offset(workspace: Path) -> None:
    """A constant offset changes the selection only by fp32 rounding; with reference losses near zero, the token losses
    rank the tokens."""
    for name, losses in (("plain", {}), ("far", {"offset": 1e4}), ("near", {"scale": 1e-4})):
        for code, errors in run(slm(workspace, name, 1, losses_only=True), 1, **losses):
            assert code == 0, errors
    for a, b, c in zip(*(records(workspace / name) for name in ("plain", "far", "near")), strict=True):
        assert a["share_selected"] == b["share_selected"] == c["share_selected"]
        assert b["threshold"] == pytest.approx(a["threshold"] - 1e4, abs=0.1)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
        assert c["threshold"] > 0 and math.isfinite(c["loss"])
