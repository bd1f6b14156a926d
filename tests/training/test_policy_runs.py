"""Runs with softmax weights, token entropy, corpora with ratios, and an adaptive ratio: layouts, resume, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.cli.pretrain import main
from megatron_slm.config.flags import parse
from megatron_slm.config.schema import RunConfig
from megatron_slm.objective.selection.predictor import PredictedThreshold, ThresholdPredictor
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, launch_each, losses, make_corpus, records
from megatron_slm.training.data_order import DataRecord
from megatron_slm.training.plan import plan
from megatron_slm.training.policy_checks import corpus_ratios, unused_ratio, unused_reference
from megatron_slm.training.preflight import resolve_values, unused_speculation
from megatron_slm.training.resume import _reference_difference

STEPS = 4
POLICIES: dict[str, dict[str, Any]] = {
    "corpora": {
        "slm_score": "token-entropy",
        "slm_corpus_ratios": ["0.9", "two_text_document"],
        "slm_weight_temperature": 0.5,
    },
    "adaptive": {"slm_score": "token-loss", "slm_ratio_gain": 2},
    "curriculum": {
        "slm_score": "token-loss",
        "slm_selection_ratio_start": 1,
        "slm_selection_ratio_warmup_tokens": 3 * 16 * 32,
        "slm_selection_ratio_style": "cosine",
    },
    "terms": {"slm_score": "token-loss:0.8 and token-entropy:0.7"},
}


def slm(directory: Path, name: str, policy: str, **flags: Any) -> list[str]:
    argv = command(
        "BLEND", directory / name, **{**POLICIES.get(policy, {}), "objective": "slm", "train_iters": STEPS, **flags}
    )
    place = argv.index("BLEND")
    argv[place : place + 1] = ["0.5", str(directory / "one_text_document"), "0.5", str(directory / "two_text_document")]
    argv[argv.index("--valid-data-path") + 1] = f"own={directory / 'one_text_document'}"
    return [*argv, "--slm-selection-ratio", "0.5"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policies")
    make_corpus(directory / "one", 1)
    make_corpus(directory / "two", 2)
    launch_each([slm(directory, policy, policy, num_layers=1) for policy in POLICIES])
    return directory


def test_ratios_are_logged(workspace: Path) -> None:
    assert [record["ratio"] for record in records(workspace / "corpora")] == [0.5] * STEPS
    assert all(record["ratio"] is None for record in records(workspace / "terms")), "the run's is not used"
    curriculum = [record["ratio"] for record in records(workspace / "curriculum")]
    assert curriculum == pytest.approx([1.0, 0.875, 0.625, 0.5])
    assert [record["share_selected"] for record in records(workspace / "curriculum")] == pytest.approx(
        curriculum, abs=0.01
    )
    adaptive = [record["ratio"] for record in records(workspace / "adaptive")]
    assert adaptive[:2] == [0.5, 0.5] and len(set(adaptive)) > 2


def test_held_out_losses_are_those_of_all_tokens(workspace: Path) -> None:
    """They are evaluated before the first step, so that the models are equal."""
    before = [records(workspace / policy, "eval")[0] for policy in POLICIES]
    assert len({(record["step"], record["loss"], record["tokens_evaluated"]) for record in before}) == 1


def test_each_corpus_has_its_ratio(workspace: Path) -> None:
    """Half of the samples come from each of the two corpora, whose ratios are 0.5 and 0.9."""
    assert records(workspace / "corpora")[0]["share_selected"] == pytest.approx(0.7, abs=0.01)


def test_resume_is_bit_for_bit(workspace: Path) -> None:
    resumed = [
        slm(workspace, f"{name}-again", name, num_layers=1, load=workspace / f"{name}-again") for name in POLICIES
    ]
    launch_each([argv for each in resumed for argv in ([*each, "--exit-interval", "2"], each)])
    for name in POLICIES:
        assert losses(workspace / f"{name}-again") == losses(workspace / name)
        ratios = [[record["ratio"] for record in records(workspace / run)] for run in (name, f"{name}-again")]
        assert ratios[0] == ratios[1]


def test_a_resume_without_an_unused_reference_model_keeps_the_ratio(workspace: Path) -> None:
    """The warning recommends to leave it out."""
    argv = slm(workspace, "unused", "adaptive", num_layers=1, load=workspace / "unused")
    launch_each([[*argv, "--reference-history", "start", "--exit-interval", "2"], argv])
    assert losses(workspace / "unused") == losses(workspace / "adaptive")


LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"dp": 2, "use_distributed_optimizer": True},
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", ["corpora", "adaptive"])
def test_layouts_agree(workspace: Path, policy: str, layout: str) -> None:
    if not (workspace / "base").exists():  # the initial weights depend on the layout
        launch(slm(workspace, "base", "plain", slm_score="token-loss", train_iters=1))
    # Equal contexts have equal entropies up to rounding, so that ties at the threshold differ sooner or later.
    start = {"load": workspace / "base", "finetune": True, "train_iters": 3}
    if not (workspace / f"{policy}-one").exists():
        launch(slm(workspace, f"{policy}-one", policy, **start))
    launch(slm(workspace, f"{policy}-{layout}", policy, **start, **LAYOUTS[layout]), 2)
    expected, found = (records(workspace / f"{policy}-{name}") for name in ("one", layout))
    assert len(found) == len(expected) == 3
    for one, two in zip(expected, found, strict=True):
        assert two["selection"] == one["selection"]
        for figure in ("loss", "loss_all", "grad_norm"):
            assert two[figure] == pytest.approx(one[figure], rel=2e-4), figure
        assert two["ratio"] == pytest.approx(one["ratio"], abs=2e-6)


TEMPERATURE, GAIN = {"slm_weight_temperature": 1}, {"slm_ratio_gain": 1}
CORPORA = {"slm_corpus_ratios": ["0.9", "two_text_document"]}
COMBINED, STOCHASTIC = {"slm_score": "token-loss and random"}, {"slm_score": "stochastic-token-loss"}
PREDICTED = {"slm_threshold": "predicted", "slm_scope": "global-batch"}
SPECULATIVE = {"slm_exact_mode": "speculative"}
RENEWED = {"reference_history": "start", "reference_refresh_interval": 2, "slm_score": "retrospective-excess"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({**TEMPERATURE, **COMBINED}, "--slm-weight-temperature needs one score without noise"),
        ({**TEMPERATURE, **STOCHASTIC}, "--slm-weight-temperature needs one score without noise"),
        ({**TEMPERATURE, **PREDICTED}, "Use --slm-threshold exact"),
        ({**TEMPERATURE, "slm_exact_mode": "speculative"}, "Use --slm-exact-mode recompute"),
        ({**TEMPERATURE, "objective": "clm"}, "--slm-weight-temperature has no effect with --objective clm"),
        ({**TEMPERATURE, "slm_weight_temperature": 0}, "must be above 0"),
        ({**CORPORA, **PREDICTED}, "Use --slm-threshold exact"),
        ({**CORPORA, "slm_score": "token-loss:0.5"}, "has no effect on the ratios in --slm-score"),
        ({**CORPORA, "num_experts": 2}, "the selected share, which is known"),
        ({"slm_corpus_ratios": ["0.9", "math"]}, "math is not a corpus of the run"),
        ({**GAIN, **COMBINED}, "--slm-ratio-gain needs one score without noise"),
        ({**GAIN, "slm_score": "random"}, "--slm-score is random"),
        ({**GAIN, "slm_score": "token-loss:0.5"}, "has no effect on the ratios in --slm-score"),
        ({**GAIN, **CORPORA}, "both determine the selection ratio"),
        ({**GAIN, "slm_selection_ratio_start": 1, "slm_selection_ratio_warmup_iters": 2}, "both determine"),
        ({**GAIN, "slm_ratio_min": 0.7}, "is outside of"),
        (
            {"slm_selection_ratio_start": 1, "slm_selection_ratio_warmup_iters": 2, "slm_score": "token-loss:0.5"},
            "--slm-selection-ratio-start has no effect on --slm-score 'token-loss:0.5': it needs a term without",
        ),
        *(
            (
                {**SPECULATIVE, "slm_score": score},
                f"--slm-exact-mode speculative has no effect with --slm-score {score!r}: it needs one of the scores",
            )
            for score in ("token-entropy", "random", "stochastic-token-loss", "token-loss and random")
        ),
        ({**SPECULATIVE, "slm_scope": "global-batch"}, "has no effect with --slm-scope global-batch"),
        ({**SPECULATIVE, **PREDICTED}, "has no effect with --slm-scope global-batch"),
        ({**SPECULATIVE, "slm_mix": 0.1}, "has no effect with --slm-mix"),
        ({**SPECULATIVE, "slm_cross_entropy": "torch"}, "has no effect with --slm-cross-entropy torch"),
        (
            {"reference_history": "start", "reference_refresh_interval": 1, "slm_score": "retrospective-excess"},
            "--reference-refresh-interval 1: in every step, the reference model has the weights of the training model",
        ),
        (
            {"reference_history": "average", "reference_average_decay": 0, "slm_score": "excess or random"},
            "--reference-average-decay 0.0: in every step, the reference model has the weights of the training model",
        ),
        (
            {**RENEWED, "slm_scope": "global-batch", "slm_threshold": "predicted"},
            "--slm-threshold predicted depends on the scores of earlier steps, which",
        ),
        (
            {**RENEWED, "slm_ratio_gain": 2},
            "--slm-ratio-gain depends on the scores of earlier steps",
        ),
        ({"slm_gumbel_temperature": 2}, "--slm-gumbel-temperature has no effect on --slm-score 'token-loss'"),
        ({"slm_ratio_min": 0.2}, "--slm-ratio-min 0.2 has no effect without --slm-ratio-gain"),
        (
            {
                "slm_selection_ratio_start": 1,
                "slm_selection_ratio_warmup_iters": 2,
                "slm_corpus_ratios": ["0.4", "one_text_document", "0.9", "two_text_document"],
            },
            "--slm-selection-ratio-start has no effect, since --slm-corpus-ratios gives every corpus a ratio",
        ),
        ({"slm_selection_ratio_warmup_iters": 9}, "no effect without --slm-selection-ratio-start"),
        ({"slm_selection_ratio_style": "cosine"}, "no effect without --slm-selection-ratio-start"),
        ({"slm_selection_ratio_levels": 3}, "no effect without --slm-selection-ratio-style steps"),
        ({"slm_selection_ratio_warmup_tokens": 9}, "no effect without --slm-selection-ratio-start"),
        (
            {"slm_selection_ratio_warmup_tokens": 9, "slm_selection_ratio_warmup_iters": 9},
            "--slm-selection-ratio-warmup-iters and --slm-selection-ratio-warmup-tokens were both given",
        ),
    ],
)
def test_conflicting_settings_are_refused(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    argv = slm(tmp_path, "run", "plain", **{"slm_score": "token-loss", **flags})
    with pytest.raises(ConfigError) as refusal:
        resolve_values(parse(argv).config, 1)
    assert message in str(refusal.value)


def _train_without_selected_tokens(rank: int, world_size: int, argv: list[str]) -> int:
    """Train with a threshold that no score reaches, from the second step."""
    predict = ThresholdPredictor.predict

    def unreachable(predictor: ThresholdPredictor, ratio: float) -> PredictedThreshold | None:
        found = predict(predictor, ratio)
        return None if found is None else replace(found, thresholds=found.thresholds + 1e6)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThresholdPredictor, "predict", unreachable)
        return main(argv)


def test_a_step_without_selected_tokens_has_no_gradient(workspace: Path) -> None:
    """The gradient of a mix cannot be normalized by their number."""
    flags = {"slm_score": "token-loss", "slm_scope": "global-batch", "slm_threshold": "predicted", "slm_mix": 0.1}
    argv = slm(workspace, "nothing", "plain", num_layers=1, **{**flags, "train_iters": 2})
    assert run_ranks(_train_without_selected_tokens, 1, argv, initialize=False) == [0]
    first, second = records(workspace / "nothing")
    assert first["share_selected"] == pytest.approx(0.5, abs=0.01) and first["grad_norm"] > 0
    assert (second["share_selected"], second["grad_norm"]) == (0, 0)


def test_changed_reference_model_is_noticed_if_reference_in_bubbles_changed() -> None:
    config = RunConfig()
    saved = replace(config, reference=replace(config.reference, reference_load=["rm"], reference_in_bubbles=True))
    ours = replace(config, reference=replace(config.reference, reference_load=["rm"]))
    record = DataRecord(reference="former")
    assert _reference_difference(ours, saved, record, "present") == ["the content of --reference-load rm has changed"]
    assert _reference_difference(ours, saved, record, "former") == []


def test_an_unused_reference_model_is_reported(tmp_path: Path) -> None:
    (tmp_path / "rm").mkdir()
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"reference_load": tmp_path / "rm"}, f"--reference-load {tmp_path / 'rm'} is not used"),
        ({"reference_scores": ["a", "b"]}, "--reference-scores a b is not used: --slm-score 'token-loss' needs no"),
        ({"reference_history": "start"}, "--reference-history start is not used"),
        ({"reference_history": "start", "slm_score": "excess or random:0.1"}, None),
        ({}, None),
    ]
    for flags, message in cases:
        argv = slm(tmp_path, "run", "plain", **{"slm_score": "token-loss", **flags})
        warning = unused_reference(resolve_values(parse(argv).config, 1))
        assert warning is None if message is None else message in str(warning)


def test_an_unused_speculation_is_reported(tmp_path: Path) -> None:
    """The logits of 8 samples of 32 tokens and a padded vocabulary of 384 take 384 KiB."""
    for flags, is_unused in (
        ({**SPECULATIVE, "slm_saved_logits_mb": 1}, True),
        ({**SPECULATIVE, "slm_saved_logits_mb": 0}, False),
        ({**SPECULATIVE, "slm_saved_logits_mb": 1, "micro_batch_size": 64, "global_batch_size": 64}, False),
        ({"slm_saved_logits_mb": 1}, False),
    ):
        argv = slm(tmp_path, "run", "plain", **{"slm_score": "token-loss", **flags})
        warning = unused_speculation(resolve_values(parse(argv).config, 1), 257, torch.device("cpu"))
        assert (warning is not None) == is_unused, flags
        assert warning is None or "--slm-exact-mode speculative is not used: the logits" in warning


def test_an_unused_ratio_is_reported(tmp_path: Path) -> None:
    """Recipes have a ratio, so that it may be given in vain."""
    both = {"slm_corpus_ratios": ["0.4", "one_text_document", "0.9", "two_text_document"]}
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"objective": "clm", "slm_score": "excess"}, "--objective clm trains on all tokens"),
        ({"slm_score": "token-loss:0.5 and random:0.7"}, "every term of --slm-score 'token-loss:0.5 and random:0.7'"),
        ({"slm_score": "token-loss:0.5 and random"}, None),
        (both, "--slm-corpus-ratios gives every corpus a ratio"),
        (CORPORA, None),
        ({**both, "slm_selection_ratio": 0.6}, None),
    ]
    for flags, message in cases:
        settings = {"slm_score": "token-loss", "slm_selection_ratio": 0.5, **flags}
        argv = slm(tmp_path, "run", "plain", **settings)[:-2]
        warning = unused_ratio(resolve_values(parse(argv).config, 1))
        assert warning is None if message is None else message in str(warning)


def test_the_plan_names_the_ratios_that_are_used(tmp_path: Path) -> None:
    for flags, expected in (
        ({}, "SLM, token-loss, k = 0.5"),
        (CORPORA, "SLM, token-loss, k = 0.5, two_text_document 0.9"),
        (
            {"slm_corpus_ratios": ["0.4", "one_text_document", "0.9", "two_text_document"]},
            "SLM, token-loss, k = one_text_document 0.4, two_text_document 0.9",
        ),
        ({"slm_score": "token-loss:0.5 and random:0.7"}, "SLM, token-loss:0.5 and random:0.7"),
    ):
        argv = slm(tmp_path, "run", "plain", **{"slm_score": "token-loss", **flags})
        rows = dict(plan(resolve_values(parse(argv).config, 1), 257, 1))
        assert rows["objective"] == expected


def test_the_plan_names_a_reference_model_that_is_used(tmp_path: Path) -> None:
    for score, expected in (("excess", "history of the training model: start"), ("token-loss", "none")):
        argv = slm(tmp_path, "run", "plain", slm_score=score, reference_history="start")
        assert dict(plan(resolve_values(parse(argv).config, 1), 257, 1))["reference"] == expected


def test_an_evaluation_needs_no_reference_model_and_no_blend(tmp_path: Path) -> None:
    """A command line of the run can be reduced to the checkpoint and the validation sets."""
    for flags in (
        {"slm_score": "excess"},
        {"reference_load": [tmp_path / "no", tmp_path / "other"], "reference_corpora": ["no", "one", "other", "two"]},
        {"slm_score": "token-loss", **CORPORA},
    ):
        argv = command("corpus", tmp_path / "run", objective="slm", load=tmp_path / "run", skip_train=True, **flags)
        place = argv.index("--data-path")
        config = resolve_values(parse(argv[:place] + argv[place + 4 :]).config, 1)
        assert not corpus_ratios(config) and unused_reference(config) is None
