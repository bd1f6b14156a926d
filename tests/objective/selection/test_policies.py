"""Softmax weights, ratios of corpora and adaptive ratios against their plain definitions."""

from __future__ import annotations

import math
from typing import Any

import definition
import pytest
import torch
import torch.distributed as dist
from test_exact import SCOPES, B, S, expected_selection, make, run
from torch import Tensor

from megatron_slm.data.blends import parse_corpus_ratios
from megatron_slm.objective.selection.adaptive import AdaptiveSelection, RatioRule
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import select
from megatron_slm.objective.selection.forward_grad import build_forward_grad_policy
from megatron_slm.objective.selection.policy import parse_policy
from megatron_slm.objective.selection.strategies import ExactSelection, GlobalBatchSelection, PredictedSelection
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.ranks import run_ranks

CORPORA = torch.tensor([2, 0, 2, 1])
RATIOS = (0.3, None, 0.9)  # of the corpora; None: the run's, 0.6


def scores(data: dict[str, Tensor], name: str) -> Tensor:
    token_loss = definition.token_losses(data["logits"], data["labels"])
    return {
        "excess": token_loss - data["reference_loss"],
        "token-entropy": definition.entropies(data["logits"]),
        "reference-loss": data["reference_loss"].double(),
    }[name]


def expected_weights(data: dict[str, Tensor], name: str, scope: str, temperature: float) -> Tensor:
    selected, values = expected_selection(data, name, scope), scores(data, name)
    rows = [slice(i, i + 1) for i in range(B)] if scope == "sequence" else [slice(0, B)]
    weights = [
        definition.softmax_weights(
            values[row].flatten().tolist(), selected[row].flatten().tolist(), temperature, name.startswith("reference")
        )
        for row in rows
    ]
    return torch.tensor(weights, dtype=torch.float64).view(B, S)


@pytest.mark.parametrize("scope", ["sequence", "data-parallel"])
@pytest.mark.parametrize("name", ["excess", "token-entropy", "reference-loss"])
def test_softmax_weights_loss_and_gradient(name: str, scope: str) -> None:
    data = make()
    loss, gradient = run(data, name, scope, weight_temperature=0.7)
    weight = expected_weights(data, name, scope, 0.7)
    exact = data["logits"].double().requires_grad_()
    numerator = (definition.token_losses(exact, data["labels"]) * weight).sum()
    assert float(weight.sum()) == pytest.approx(int(loss.count)), "the mean weight is 1"
    assert float(loss.numerator) == pytest.approx(float(numerator), rel=1e-5)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(numerator, exact)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.6, 1.0])
def test_softmax_weights_at_a_high_temperature_are_equal(ratio: float) -> None:
    """With k = 1, this is CLM."""
    hard, hard_gradient = run(make(), "excess", "data-parallel", ratio=ratio)
    soft, soft_gradient = run(make(), "excess", "data-parallel", ratio=ratio, weight_temperature=1e9)
    assert torch.equal(hard.selected, soft.selected)
    torch.testing.assert_close(soft_gradient, hard_gradient)


def test_softmax_weights_of_large_scores_and_of_nothing() -> None:
    data = make()
    data["reference_loss"] *= 1e30
    loss, gradient = run(data, "excess", "sequence", weight_temperature=1e-3)
    assert bool(gradient.isfinite().all()) and bool(loss.numerator.isfinite())
    data["valid"] = torch.zeros_like(data["valid"])
    loss, gradient = run(data, "excess", "data-parallel", weight_temperature=1.0)
    assert float(loss.numerator) == 0 and bool((gradient == 0).all())


@pytest.mark.parametrize("temperature", [5e-324, 1e-30])
def test_softmax_weights_at_the_lowest_temperatures(temperature: float) -> None:
    """The highest score of each sequence has all of its weight."""
    loss, gradient = run(make(), "excess", "sequence", weight_temperature=temperature)
    assert bool(loss.numerator.isfinite()) and bool(gradient.isfinite().all())


def test_different_weights_have_no_gradient_in_the_forward_pass() -> None:
    valid = torch.ones(B, S, dtype=torch.bool)
    config = SelectionConfig(parse_policy("excess"), weight_temperature=1.0)
    assert build_forward_grad_policy(config, 1.0, valid, ReferenceScores(torch.zeros(B, S))) is None


def expected_by_corpus(data: dict[str, Tensor], scope: str) -> Tensor:
    values, selected = scores(data, "excess").float(), torch.zeros(B, S, dtype=torch.bool)
    for corpus, ratio in enumerate(RATIOS):
        valid = data["valid"] & (data["corpus"] == corpus)[:, None]
        selected |= definition.select_scope(values, valid, ratio or 0.6, scope)
    return selected


@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize("scope", SCOPES)
def test_corpora_are_ranked_separately(scope: str, mix: float) -> None:
    data = {**make(), "corpus": CORPORA}
    loss, _ = run(data, "excess", scope, corpus_ratios=RATIOS, mix=mix)
    assert torch.equal(loss.selected, expected_by_corpus(data, scope))
    unit = {**data, "logits": torch.zeros_like(data["logits"])}  # every token loss is log V
    loss, _ = run(unit, "reference-loss", scope, corpus_ratios=RATIOS, mix=mix)
    assert float(loss.numerator) == pytest.approx(int(loss.count) * math.log(data["logits"].size(-1)), rel=1e-5)
    assert bool(loss.threshold.isfinite())


def test_equal_ratios_of_all_corpora_select_everything_only_at_one() -> None:
    config = SelectionConfig(parse_policy("excess"), corpus_ratios=(1.0, None))
    assert config.selects_everything(1.0) and not config.selects_everything(0.6)
    clm, _ = run(make(), None, "data-parallel")
    all_of_each, _ = run({**make(), "corpus": CORPORA}, "excess", "data-parallel", ratio=1.0, corpus_ratios=(1.0,) * 3)
    assert torch.equal(all_of_each.selected, clm.selected) and torch.equal(all_of_each.numerator, clm.numerator)


VARIANTS: list[dict[str, Any]] = [
    {"text": "excess", "weight_temperature": 0.7},
    {"text": "token-entropy", "corpus_ratios": RATIOS, "weight_temperature": 2.0, "mix": 0.2},
]


def _on_ranks(rank: int, world_size: int, group: Any = None) -> list[tuple[Tensor, Tensor]]:
    data = {name: value.chunk(world_size)[rank] for name, value in {**make(), "corpus": CORPORA}.items()}
    found = []
    for variant in VARIANTS:
        settings = dict(variant)
        text = settings.pop("text")
        loss, gradient = run(data, text, "data-parallel", dist.group.WORLD if world_size > 1 else None, **settings)
        found.append((loss.selected, gradient))
    return found


def test_data_parallel_ranks_agree_with_one_process() -> None:
    one, two = _on_ranks(0, 1), run_ranks(_on_ranks, 2)
    for number, (selected, gradient) in enumerate(one):
        assert torch.equal(torch.cat([part[number][0] for part in two]), selected)
        torch.testing.assert_close(torch.cat([part[number][1] for part in two]), gradient)


def _tokens(seed: int) -> TokenBatch:
    chance = torch.Generator().manual_seed(seed)
    index = torch.arange(B * S).view(B, S)
    loss = (1 + 0.05 * seed) * torch.rand(B, S, generator=chance)
    return TokenBatch(loss, torch.rand(B, S, generator=chance) < 0.9, index, index)


def _adapt(strategy: AdaptiveSelection, steps: range, ratio: float = 0.5) -> list[float]:
    ratios = []
    for step in steps:
        strategy.begin_step(ratio, ratio, list)
        for number in range(2):
            strategy.select(number, _tokens(2 * step + number))
        strategy.end_step()
        ratios.append(strategy.ratio)
    return ratios


def test_adaptive_ratio_follows_the_definition_and_resumes() -> None:
    config, rule = SelectionConfig(parse_policy("token-loss")), RatioRule(gain=1.0, lowest=0.3, highest=0.8)

    def build() -> AdaptiveSelection:
        return AdaptiveSelection(ExactSelection(config, torch.device("cpu")), rule)

    ratio, before, expected = 0.5, None, []
    for step in range(8):
        expected.append(ratio)
        chosen = []
        for number in range(2):
            tokens = _tokens(2 * step + number)
            chosen += tokens.loss[select(tokens, config, ratio).selected].double().tolist()
        risk = sum(chosen) / len(chosen)
        if before is not None:
            ratio = round(min(max(ratio * math.exp(risk - before), 0.3), 0.8), 6)
        before = risk
    strategy = build()
    assert _adapt(strategy, range(8)) == pytest.approx(expected, abs=2e-6)
    assert 0.6 < max(expected) <= 0.8 and len(set(expected)) > 3
    first, second = build(), build()
    _adapt(first, range(4))
    second.load_state_dict(first.state_dict())
    assert _adapt(second, range(4, 8)) == _adapt(first, range(4, 8))
    changed = build()
    changed.load_state_dict(first.state_dict())
    assert _adapt(changed, range(4), 0.7) == _adapt(build(), range(4), 0.7)


@pytest.mark.parametrize("risk", [math.nan, math.inf, -math.inf])
def test_unknown_risk_keeps_the_ratio(risk: float) -> None:
    rule = RatioRule(gain=1.0, lowest=0.1, highest=1.0)
    assert rule.next_ratio(0.5, risk, 1.0) == rule.next_ratio(0.5, 1.0, risk) == 0.5
    assert (rule.next_ratio(0.5, 1e30, 0.0), rule.next_ratio(0.5, -1e30, 0.0)) == (1.0, 0.1)


def test_small_bounds_and_large_gains_of_the_ratio() -> None:
    small, steep = (RatioRule(gain, 1e-9, 0.8) for gain in (1.0, 1e308))
    assert small.next_ratio(2e-9, -50.0, 0.0) == 1e-9, "rounding stays within the bounds"
    assert (steep.next_ratio(0.5, 9.0, 1.0), steep.next_ratio(0.5, 1.0, 9.0)) == (0.8, 2.3e-5)


def test_bounds_that_a_resume_changes_hold_from_its_first_step() -> None:
    config = SelectionConfig(parse_policy("token-loss"))
    strategy = AdaptiveSelection(ExactSelection(config, torch.device("cpu")), RatioRule(1.0, 0.3, 0.4))
    strategy.load_state_dict({"ratio": 0.8, "risk": 1.0})
    strategy.begin_step(0.35, 0.35, list)
    assert strategy.ratio == 0.4


def test_state_of_another_strategy_is_ignored() -> None:
    """A resumed run may change --slm-threshold or --slm-ratio-gain."""
    config, device = SelectionConfig(parse_policy("token-loss"), scope="global-batch"), torch.device("cpu")
    adaptive = AdaptiveSelection(GlobalBatchSelection(config, device), RatioRule(1.0, 0.1, 1.0))
    predicted = PredictedSelection(config, device)
    before = predicted.state_dict()
    predicted.load_state_dict({"ratio": 0.8, "risk": 1.0})
    adaptive.load_state_dict(before)
    assert repr(predicted.state_dict()) == repr(before), "values may be NaN"
    assert adaptive.adapted is None and math.isnan(adaptive.risk)


PREFIXES = ["data/web_text_document", "math", "other/math"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0.4"], "expected pairs"),
        (["web_text_document", "0.4"], "expected pairs"),
        (["0", "math"], "expected pairs"),
        (["1.5", "math"], "expected pairs"),
        (["nan", "math"], "expected pairs"),
        (["0.4", "code"], "code is not a corpus of the run"),
        (["0.4", "math", "0.5", "./math"], "named twice"),
    ],
)
def test_ratios_of_corpora_that_cannot_be_read(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_corpus_ratios(arguments, PREFIXES, "--slm-corpus-ratios")


def test_ratios_of_corpora_by_prefix_or_unique_name() -> None:
    assert parse_corpus_ratios(["0.4", "web_text_document"], PREFIXES, "") == (0.4, None, None)
    assert parse_corpus_ratios(["0.4", "other/math", "1", "math"], PREFIXES, "") == (None, 1.0, 0.4)
    with pytest.raises(ConfigError, match="several corpora"):
        parse_corpus_ratios(["0.4", "math"], ["a/math", "b/math"], "")
    with pytest.raises(ConfigError, match="needs a blend"):
        parse_corpus_ratios(["0.4", "math"], ["math"], "")
