"""Selection, loss and gradient for every score and scope against the plain definition, on one process and several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import definition
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.objective.cross_entropy import vocab_parallel_entropy, vocab_parallel_token_loss
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import select
from megatron_slm.objective.selection.policy import parse_policy
from megatron_slm.objective.selective_loss import SelectiveLoss, selective_loss
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch, diverged_tokens
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.ranks import run_ranks

B, S, V = 4, 9, 24
SCOPES = ("sequence", "micro-batch", "data-parallel", "global-batch")
POLICIES = (
    "excess",
    "retrospective-excess",
    "token-loss",
    "token-entropy",
    "reference-loss",
    "reference-entropy",
    "reference-loss:0.7 and reference-entropy:0.8",
    "excess:0.3 or token-loss:0.2",
)


def make() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(11)
    reference_logits = 2 * torch.randn(B, S, V, generator=chance)
    labels = torch.randint(0, V, (B, S), generator=chance)
    return {
        "logits": 2 * torch.randn(B, S, V, generator=chance),
        "labels": labels,
        "valid": torch.rand(B, S, generator=chance) < 0.8,
        "reference_loss": definition.token_losses(reference_logits, labels).float(),
        "reference_entropy": definition.entropies(reference_logits).float(),
        "index": 1000 + torch.arange(B * S).view(B, S),
    }


def run(
    data: dict[str, Tensor], text: str | None, scope: str, group: Any = None, tp: Any = None, **more: Any
) -> tuple[SelectiveLoss, Tensor]:
    logits = data["logits"].detach().requires_grad_()
    tokens = TokenBatch(
        loss=vocab_parallel_token_loss(logits, data["labels"], tp),
        valid=data["valid"],
        global_token_index=data["index"],
        step_token_index=data["index"] - 1000,
        reference=ReferenceScores(data["reference_loss"], data["reference_entropy"]),
        entropy=vocab_parallel_entropy(logits, tp),
        corpus=data.get("corpus"),
    )
    policy = None if text is None else parse_policy(text)
    ratio = more.pop("ratio", 0.6)
    loss = selective_loss(tokens, select(tokens, SelectionConfig(policy, scope, group, **more), ratio))
    (gradient,) = torch.autograd.grad(loss.numerator, logits)
    return loss, gradient


def expected_selection(data: dict[str, Tensor], text: str, scope: str) -> Tensor:
    token_loss = definition.token_losses(data["logits"], data["labels"]).float()
    scores = {
        "excess": token_loss - data["reference_loss"],
        "retrospective-excess": data["reference_loss"] - token_loss,
        "token-loss": token_loss,
        "token-entropy": definition.entropies(data["logits"]).float(),
        "reference-loss": data["reference_loss"],
        "reference-entropy": data["reference_entropy"],
    }
    parts = []
    for word in text.replace(" and ", " ").replace(" or ", " ").split():
        name, _, ratio = word.partition(":")
        lowest = name.startswith("reference")
        parts.append(definition.select_scope(scores[name], data["valid"], float(ratio or 0.6), scope, lowest))
    if len(parts) == 1:
        return parts[0]
    return parts[0] & parts[1] if " and " in text else parts[0] | parts[1]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("text", POLICIES)
def test_selection_loss_and_gradient(text: str, scope: str) -> None:
    data = make()
    loss, gradient = run(data, text, scope)
    selected = expected_selection(data, text, scope)
    assert torch.equal(loss.selected, selected)
    exact = data["logits"].double().requires_grad_()
    numerator = (definition.token_losses(exact, data["labels"]) * selected).sum()
    assert float(loss.numerator) == pytest.approx(float(numerator), rel=1e-5)
    assert int(loss.count) == int(selected.sum())
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(numerator, exact)[0], rtol=1e-5, atol=1e-6)


def _on_data_parallel_ranks(rank: int, world_size: int, text: str, mix: float) -> tuple[Tensor, Tensor, float, int]:
    data = {name: value.chunk(world_size)[rank] for name, value in make().items()}
    loss, gradient = run(data, text, "data-parallel", dist.group.WORLD, mix=mix)
    return loss.selected, gradient, float(loss.numerator), int(loss.count)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("text", ["excess", "random", "stochastic-excess", POLICIES[5]])
def test_data_parallel_ranks_agree_with_one_process(text: str, world_size: int) -> None:
    one, one_gradient = run(make(), text, "data-parallel", mix=0.25)
    parts = run_ranks(_on_data_parallel_ranks, world_size, text, 0.25)
    assert torch.equal(torch.cat([part[0] for part in parts]), one.selected)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), one_gradient)
    assert sum(part[2] for part in parts) == pytest.approx(float(one.numerator), rel=1e-5)
    assert sum(part[3] for part in parts) == int(one.count)


def _on_tensor_parallel_ranks(rank: int, world_size: int) -> dict[tuple[str, str], tuple[Tensor, Tensor, float]]:
    data = make()
    data["logits"] = data["logits"].chunk(world_size, dim=-1)[rank].contiguous()
    results = {}
    for text in POLICIES:
        for scope in SCOPES:
            loss, gradient = run(data, text, scope, tp=dist.group.WORLD)
            results[text, scope] = (loss.selected, gradient, float(loss.numerator))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_parallel_ranks_agree_with_the_definition(world_size: int) -> None:
    """Every score and scope over a sharded vocabulary."""
    data = make()
    parts = run_ranks(_on_tensor_parallel_ranks, world_size)
    for text, scope in parts[0]:
        selected = expected_selection(data, text, scope)
        exact = data["logits"].double().requires_grad_()
        numerator = (definition.token_losses(exact, data["labels"]) * selected).sum()
        for part in parts:
            assert torch.equal(part[text, scope][0], selected)
            assert part[text, scope][2] == pytest.approx(float(numerator), rel=1e-5)
        gradient = torch.cat([part[text, scope][1] for part in parts], -1)
        expected = torch.autograd.grad(numerator, exact)[0]
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_everything_selected_is_clm_bit_for_bit() -> None:
    clm, clm_gradient = run(make(), None, "data-parallel")
    slm, slm_gradient = run(make(), "excess", "data-parallel", ratio=1.0)
    assert torch.equal(clm.numerator, slm.numerator) and torch.equal(clm_gradient, slm_gradient)
    assert torch.equal(clm.selected, slm.selected) and torch.equal(clm.count, slm.count)


@pytest.mark.parametrize("scope", SCOPES)
def test_mix_keeps_the_weight_and_gives_clm_at_one(scope: str) -> None:
    data = make()
    unit = {**data, "logits": torch.zeros_like(data["logits"])}  # every token loss is log V
    plain, _ = run(unit, "reference-loss", scope)
    mixed, _ = run(unit, "reference-loss", scope, mix=0.3)
    assert float(mixed.numerator) == pytest.approx(float(plain.numerator), rel=1e-5)
    whole, _ = run(data, "excess", "micro-batch", mix=1.0)
    token_loss = definition.token_losses(data["logits"], data["labels"])[data["valid"]]
    assert float(whole.numerator / whole.count) == pytest.approx(float(token_loss.mean()), rel=1e-5)


def test_equal_scores_take_the_first_tokens() -> None:
    data = make()
    data["reference_loss"] = torch.ones(B, S)
    loss, _ = run(data, "reference-loss", "micro-batch", ratio=0.5)
    places = torch.nonzero(data["valid"].flatten()).flatten()
    assert torch.nonzero(loss.selected.flatten()).flatten().tolist() == places[: int(loss.count)].tolist()


@pytest.mark.parametrize("scope", SCOPES)
def test_all_scores_equal(scope: str) -> None:
    data = make()
    data["reference_loss"] = torch.full((B, S), 2.0)
    loss, _ = run(data, "reference-loss", scope)
    assert torch.equal(loss.selected, expected_selection(data, "reference-loss", scope))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("change", [lambda x: x + 1e4, lambda x: x * 1e-4, lambda x: x * 1e-30, lambda x: x * 1e30])
def test_reference_of_wildly_different_loss(change: Callable[[Tensor], Tensor], scope: str) -> None:
    data = make()
    data["reference_loss"] = change(data["reference_loss"])
    loss, _ = run(data, "excess", scope)
    assert torch.equal(loss.selected, expected_selection(data, "excess", scope))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_no_number_is_found_and_counted_as_any_other(fault: float, scope: str) -> None:
    data = make()
    row, position = (int(place) for place in data["valid"].nonzero()[-1])
    data["reference_loss"][row, position] = fault
    data["reference_loss"][~data["valid"]] = torch.nan
    loss, _ = run(data, "excess", scope)
    assert int(loss.count) == int(expected_selection(make(), "excess", scope).sum())
    tokens = TokenBatch(
        data["logits"].sum(-1), data["valid"], data["index"], data["index"], ReferenceScores(data["reference_loss"])
    )
    assert diverged_tokens(tokens).nonzero().tolist() == [[row, position]]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_sequence_without_valid_tokens(scope: str) -> None:
    data = make()
    data["valid"][1] = False
    loss, gradient = run(data, "excess", scope)
    assert torch.equal(loss.selected, expected_selection(data, "excess", scope))
    assert bool((gradient[1] == 0).all()) and bool(gradient.isfinite().all())


def _few(rank: int, world_size: int, without: bool) -> Tensor:
    data = {name: value.chunk(world_size)[rank] for name, value in make().items()}
    if without and rank == 1:
        data["valid"] = torch.zeros_like(data["valid"])
    loss, gradient = run(data, "excess", "global-batch", dist.group.WORLD, ratio=0.6 if without else 0.01)
    assert bool(gradient.isfinite().all())
    return loss.selected


@pytest.mark.parametrize("without", [False, True])
def test_ranks_on_which_nothing_is_selected_or_valid(without: bool) -> None:
    data = make()
    if without:
        data["valid"][1] = False
    one, _ = run(data, "excess", "global-batch", ratio=0.6 if without else 0.01)
    assert torch.equal(torch.cat(run_ranks(_few, 4, without)), one.selected)
    assert without or int(one.selected.sum()) == 1


def test_nothing_valid_selects_nothing() -> None:
    data = make()
    data["valid"] = torch.zeros(B, S, dtype=torch.bool)
    loss, gradient = run(data, "excess", "data-parallel")
    assert int(loss.count) == 0 and float(loss.numerator) == 0 and bool((gradient == 0).all())


def test_masked_infinite_loss_does_no_harm() -> None:
    data = make()
    data["valid"][0, 0] = False
    data["reference_loss"][0, 0] = torch.nan
    loss, gradient = run(data, "excess", "micro-batch")
    assert bool(loss.numerator.isfinite()) and bool(gradient.isfinite().all())


def _one_rank_diverges(rank: int, world_size: int, which: str) -> tuple[int, int]:
    data = make()
    data["valid"][:] = True
    data["index"] += rank * B * S
    if rank == 1 and which == "reference":
        data["reference_loss"][2, 5] = torch.inf
    elif rank == 1:
        data["logits"][2, 5] = torch.nan
    loss, _ = run(data, "excess", "data-parallel", dist.group.WORLD)
    return int(loss.count), int(loss.selected[2, 5])


@pytest.mark.parametrize("which", ["reference", "training"])
def test_divergence_on_one_rank_does_not_block_the_others(which: str) -> None:
    other, owner = run_ranks(_one_rank_diverges, 2, which)
    assert other[0] + owner[0] == -(-6 * 2 * B * S // 10)
    assert owner[1] == (which == "training")  # NaN ranks above all numbers, and an excess of minus infinity below


@pytest.mark.parametrize(
    "text",
    [
        *("", "loss", "excess:0", "excess:2", "excess:x", "excess and", "(excess", "excess excess"),
        *(f"{'(' * 5000}excess{')' * 5000}", " and ".join(["excess"] * 3000)),
    ],
    ids=lambda text: text[:30],
)
def test_policy_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="--slm-score"):
        parse_policy(text)


def test_and_binds_tighter_than_or() -> None:
    assert parse_policy("excess or random and token-loss") == parse_policy("excess or (random and token-loss)")
    assert parse_policy("(excess or random) and token-loss") != parse_policy("excess or random and token-loss")


def test_stochastic_selection_follows_the_scores() -> None:
    """With a low temperature Gumbel top-k is top-k; with a high one it is nearly random."""
    data = make()
    exact, _ = run(data, "excess", "micro-batch")
    colds = [run(data, "stochastic-excess", "micro-batch", temperature=low)[0] for low in (1e-6, 1e-40, 5e-324)]
    hot, _ = run(data, "stochastic-excess", "micro-batch", temperature=1e3)
    assert all(torch.equal(cold.selected, exact.selected) for cold in colds)
    assert not torch.equal(hot.selected, exact.selected)
