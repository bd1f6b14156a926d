"""Test training with several co-located reference models, combined or one for each corpus."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.cli.pretrain import main
from megatron_slm.data.batches import MicroBatch
from megatron_slm.objective.tokens import ReferenceScores
from megatron_slm.reference.ensemble import ReferenceEnsemble
from megatron_slm.reference.replica import ReferenceReplica
from megatron_slm.scores.combination import Combine
from megatron_slm.testing.tiny import captured, command, launch, launch_each, make_corpus, records

SCHEDULE = {"override_opt_param_scheduler": True}
CORPORA = ["rm", "one_text_document", "other", "two_text_document"]


class Constant(ReferenceReplica):
    """Score every token with values that are given."""

    def __init__(self, values: torch.Tensor, with_entropy: bool) -> None:
        self.values, self.with_entropy = values, with_entropy

    def score(self, micro_batches: Any) -> list[ReferenceScores]:
        return [ReferenceScores(self.values, -self.values if self.with_entropy else None) for _ in micro_batches]


def batch(corpora: list[int]) -> MicroBatch:
    tokens = torch.zeros(len(corpora), 5, dtype=torch.long)
    return MicroBatch(
        *(tokens, tokens, tokens > -1, tokens, torch.arange(len(corpora)), 0), corpus=torch.tensor(corpora)
    )


@pytest.mark.parametrize("with_entropy", [False, True])
def test_rows_get_the_scores_of_the_model_of_their_corpus(with_entropy: bool) -> None:
    values, of_corpus, corpora = torch.rand(2, 4, 5), [1, 0, 1], [2, 1, 0, 1]
    replicas = [Constant(each, with_entropy) for each in values]
    [scores] = ReferenceEnsemble(replicas, Combine.parse("mean", 2), of_corpus).score([batch(corpora)])
    expected = torch.stack([values[of_corpus[corpus], row] for row, corpus in enumerate(corpora)])
    assert torch.equal(scores.loss, expected)
    assert (scores.entropy is not None) == with_entropy
    assert scores.entropy is None or torch.equal(scores.entropy, -expected)


def test_other_stages_have_no_scores() -> None:
    class OtherStage(Constant):
        def score(self, micro_batches: Any) -> list[ReferenceScores]:
            return []

    replicas = [OtherStage(torch.ones(1, 5), False) for _ in range(2)]
    assert ReferenceEnsemble(replicas, Combine.parse("min", 2)).score([batch([0])]) == []


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create two corpora, a base, two reference models of different sizes, and runs of one process."""
    directory = tmp_path_factory.mktemp("ensemble")
    one, two = (make_corpus(directory / name, seed, documents=20) for seed, name in ((1, "one"), (2, "two")))
    sizes: list[dict[str, Any]] = [{"num_layers": 2}, {"num_layers": 4, "hidden_size": 16}, {"num_layers": 2}]
    models = [("rm", two, 4), ("other", one, 2), ("base", one, 3)]
    launch_each(
        [
            command(corpus, directory / name, train_iters=n, eval_iters=0, **size)
            for (name, corpus, n), size in zip(models, sizes, strict=True)
        ]
    )
    shutil.copytree(directory / "rm", directory / "copy")
    (directory / "rm-link").symlink_to("rm")
    launch_each(
        [
            slm(directory, "single-combine"),
            slm(directory, "single-corpora", reference_combine=None, reference_corpora=CORPORA),
        ]
    )
    return directory


def slm(directory: Path, save: str | None, models: tuple[str, ...] = ("rm", "other"), **flags: Any) -> list[str]:
    """Return the command of a run on a blend of both corpora."""
    blend = ["0.6", str(directory / "one_text_document"), "0.4", str(directory / "two_text_document")]
    settings = {
        "data_path": blend,
        "objective": "slm",
        "reference_load": [str(directory / model) for model in models],
        "reference_combine": "0.3,0.7",
        "train_iters": 2,
        "num_layers": 2,
        "load": directory / "base",
        "finetune": True,
        "losses_only": True,
        **flags,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    return command(blend[1], None if save is None else directory / save, **given)


@pytest.mark.parametrize("kind", ["combine", "corpora"])
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"dp": 2},
        {"context_parallel_size": 2},
    ],
    ids=lambda layout: next(iter(layout)),
)
def test_every_layout_agrees_with_one_process(workspace: Path, layout: dict[str, Any], kind: str) -> None:
    name = f"{kind}-{next(iter(layout))}"
    flags = {"reference_combine": None, "reference_corpora": CORPORA} if kind == "corpora" else {}
    launch(slm(workspace, name, **flags, **layout), 2)
    for one, many in zip(records(workspace / f"single-{kind}"), records(workspace / name), strict=True):
        assert many["selection"] == one["selection"], "another set of tokens was selected"
        for figure in ("loss", "loss_all", "threshold", "grad_norm"):
            assert many[figure] == pytest.approx(one[figure], rel=2e-4, abs=2e-5), figure


def test_models_of_equal_weights_are_one_model(workspace: Path) -> None:
    """Combined or by corpus, two copies of a model select the tokens of one; different models select others."""
    copies = {"models": ("rm", "copy")}
    runs: dict[str, dict[str, Any]] = {
        "one": {"models": ("rm",), "reference_combine": None},
        "mean": {**copies, "reference_combine": None},
        "min": {**copies, "reference_combine": "min"},
        "corpora": {
            **copies,
            "reference_combine": None,
            "reference_corpora": ["copy", *CORPORA[1:2], "rm", CORPORA[3]],
        },
        "other": {"models": ("other",), "reference_combine": None},
    }
    launch_each([slm(workspace, f"equal-{name}", **flags) for name, flags in runs.items()])
    found = {name: [step["selection"] for step in records(workspace / f"equal-{name}")] for name in runs}
    assert found["one"] == found["mean"] == found["min"] == found["corpora"] != found["other"]
    for kind in ("combine", "corpora"):
        assert [step["selection"] for step in records(workspace / f"single-{kind}")] not in found.values()


def test_flops_of_all_models_count(workspace: Path) -> None:
    launch(slm(workspace, "flops", models=("rm",), reference_combine=None, train_iters=1))
    one, both = (records(workspace / name)[0] for name in ("flops", "single-combine"))
    flops = [record["tflops"] / record["tokens_per_second"] for record in (one, both)]
    assert flops[1] > 1.05 * flops[0]


def test_dry_run_names_every_model(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    corpora = {"reference_combine": None, "reference_corpora": CORPORA}
    for flags, kind in (({}, "combined by 0.3,0.7"), (corpora, f"by corpus ({' '.join(CORPORA)})")):
        code, output, _ = captured(slm(workspace, None, dry_run=True, **flags))
        assert code == 0 and f"{workspace}/rm, {workspace}/other, {kind}" in output


def test_a_changed_ensemble_is_noticed_on_resume(workspace: Path) -> None:
    """The content of one model of several changes under equal flags."""
    copy = workspace / "changing"
    shutil.copytree(workspace / "rm", copy)
    flags: dict[str, Any] = {"models": ("other", "changing"), "losses_only": False, "eval_iters": 0}
    argv = slm(workspace, "resumed", **flags, train_iters=1)
    assert main(argv) == 0
    resumed = {**flags, "load": workspace / "resumed", "finetune": None, "train_iters": 2, **SCHEDULE}
    shutil.rmtree(copy)
    shutil.copytree(workspace / "base", copy)
    code, output, errors = captured(slm(workspace, "resumed", **resumed))
    assert code == 0, errors
    assert "the content of --reference-load" in " ".join((output + errors).split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"models": ("rm", "rm")}, "twice. Give each reference model once"),
        ({"models": ("rm", "rm-link")}, "rm-link twice. Give each reference model once"),
        ({"models": ("rm", "nowhere")}, "nowhere: there is no such directory"),
        ({"models": ("rm",)}, "--reference-combine 0.3,0.7 has no effect without two or more reference models"),
        ({"reference_combine": "1,2,3"}, "expected one weight per reference model, 2, not 3"),
        ({"reference_corpora": CORPORA}, "--reference-combine and --reference-corpora were both given"),
        ({"reference_combine": None, "reference_corpora": CORPORA[:2]}, "corpora without a reference model: "),
        ({"reference_ckpt_step": 2}, "--reference-ckpt-step 2 needs one --reference-load"),
        (
            {"reference_in_bubbles": True, "pipeline_model_parallel_size": 2, "world_size": 2, "dry_run": True},
            "--reference-in-bubbles needs one --reference-load",
        ),
        ({"reference_history": "start"}, "--reference-load and --reference-history were both given"),
        ({"seq_length": 64}, "/rm/iter_0000004: the reference model was trained with --seq-length 32"),
    ],
)
def test_wrong_ensembles_are_refused(workspace: Path, flags: dict[str, Any], message: str) -> None:
    code, output, error = captured(slm(workspace, None, **flags))
    assert code == 2 and message in " ".join((output + error).split())
