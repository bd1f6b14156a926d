"""Tokens whose gradient may be computed in the forward pass, for every kind of selection."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import Selection
from megatron_slm.objective.selection.forward_grad import SpeculativeThreshold, build_forward_grad_policy
from megatron_slm.objective.selection.policy import parse_policy
from megatron_slm.objective.selection.predictor import (
    PredictedThreshold,
    lowest_selected_scores,
    select_by_threshold,
)
from megatron_slm.objective.selection.strategies import ExactSelection
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch

VALID = torch.tensor([[True, False, True]])
REFERENCE = ReferenceScores(torch.tensor([[1.0, 2.0, 3.0]]))
OTHER_SCORES = ["random", "reference-loss", "stochastic-excess", "excess and random"]


@pytest.mark.parametrize(
    ("score", "ratio"), [(None, 0.6), ("excess", 1.0), ("random", 1.0), ("excess:1.0 and random:1.0", 0.5)]
)
def test_all_tokens_if_everything_is_selected(score: str | None, ratio: float) -> None:
    policy = None if score is None else parse_policy(score)
    mask = build_forward_grad_policy(SelectionConfig(policy), ratio, VALID, REFERENCE)
    assert mask is not None
    assert mask.chosen(slice(0, 3), torch.zeros(3)).tolist() == [True, False, True]
    assert build_forward_grad_policy(SelectionConfig(policy, mix=0.1), ratio, VALID, REFERENCE) is None


@pytest.mark.parametrize("score", ["excess", "token-loss"])
def test_speculation_waits_for_two_thresholds_and_adds_a_band(score: str) -> None:
    speculation, config = SpeculativeThreshold(), SelectionConfig(parse_policy(score))
    for threshold in (2.0, 1.5):
        assert speculation.estimate() is None
        speculation.observe(torch.tensor(threshold))
    # The last threshold, 1.5, plus the step of 0.5.
    mask = build_forward_grad_policy(config, 0.6, VALID, REFERENCE, threshold=speculation.estimate())
    offset = 3.0 if score == "excess" else 0.0
    assert mask is not None
    for loss, chosen in ((2.01, True), (1.99, False)):
        assert mask.chosen(slice(2, 3), torch.tensor([loss + offset])).tolist() == [chosen]
    assert mask.chosen(slice(1, 2), torch.tensor([99.0])).tolist() == [False], "an invalid token"


@pytest.mark.parametrize("threshold", [torch.tensor(1.5), torch.zeros(1, 3)], ids=["scalar", "per token"])
@pytest.mark.parametrize("score", OTHER_SCORES)
def test_a_threshold_decides_only_if_the_score_depends_on_the_token_loss_alone(
    score: str, threshold: torch.Tensor
) -> None:
    config = SelectionConfig(parse_policy(score))
    assert build_forward_grad_policy(config, 0.6, VALID, REFERENCE, threshold=threshold) is None
    everything = build_forward_grad_policy(config, 1.0, VALID, REFERENCE, threshold=threshold)
    assert everything is not None
    assert everything.chosen(slice(0, 3), torch.zeros(3)).tolist() == VALID[0].tolist()


def test_excess_loss_needs_reference_scores() -> None:
    config = SelectionConfig(parse_policy("excess"))
    assert build_forward_grad_policy(config, 0.6, VALID, None, threshold=torch.tensor(0.0)) is None


@pytest.mark.parametrize("score", ["excess", "token-loss"])
@pytest.mark.parametrize("tied", [0.0, 0.4, 1.0])
def test_a_predicted_threshold_chooses_the_selection_itself(score: str, tied: float) -> None:
    """Also if many scores are equal to it, in the order of the hidden states."""
    rng = torch.Generator().manual_seed(3)
    reference = ReferenceScores(torch.randint(0, 3, (4, 50), generator=rng) / 2)
    loss = reference.loss + torch.randint(-2, 3, (4, 50), generator=rng) / 4
    index = torch.arange(1000, 1200).view(4, 50)
    tokens = TokenBatch(loss, torch.rand(4, 50, generator=rng) < 0.8, index, index, reference)
    predicted = PredictedThreshold(torch.tensor([0.25]), torch.tensor([tied], dtype=torch.float64), torch.tensor(0.6))
    config = SelectionConfig(parse_policy(score), "global-batch")
    (lowest,) = lowest_selected_scores(index, config, predicted)
    mask = build_forward_grad_policy(config, 0.6, tokens.valid, reference, threshold=lowest)
    selected = select_by_threshold(tokens, config, predicted).selected
    scores = loss - reference.loss if score == "excess" else loss
    at_threshold = tokens.valid & (scores == 0.25)
    assert torch.equal(selected & ~at_threshold, tokens.valid & (scores > 0.25))
    assert float(selected[at_threshold].float().mean()) == pytest.approx(tied, abs=0.25)
    assert mask is not None
    assert torch.equal(mask.chosen(slice(0, 200), loss.t().reshape(-1)), selected.t().reshape(-1))


@pytest.mark.parametrize("score", ["excess", *OTHER_SCORES])
def test_a_known_selection_needs_no_losses(score: str) -> None:
    selection = Selection(torch.tensor([[True, False, False]]), torch.ones(1, 3), torch.zeros(()))
    config = SelectionConfig(parse_policy(score))
    mask = build_forward_grad_policy(config, 0.6, VALID, None, selected=selection.selected)
    assert mask is not None
    assert mask.chosen(slice(0, 3), torch.full((3,), 9.0)).tolist() == [True, False, False]


def test_the_band_follows_the_steps_of_the_threshold() -> None:
    speculation = SpeculativeThreshold()
    for threshold in (1.0, 2.0, 2.0):
        speculation.observe(torch.tensor(threshold))
    assert float(speculation.estimate()) == pytest.approx(2.0 + 0.9)


@pytest.mark.parametrize(
    "thresholds", [(math.inf, 1.0, 2.0, 2.0), (1.0, math.inf, 2.0, 2.0), (1.0, 2.0, math.nan, 2.0)]
)
def test_the_band_leaves_out_micro_batches_without_a_threshold(thresholds: Sequence[float]) -> None:
    """The threshold of a micro-batch without valid tokens is infinite."""
    speculation = SpeculativeThreshold()
    for threshold in thresholds:
        speculation.observe(torch.tensor(threshold))
    assert float(speculation.estimate()) == pytest.approx(2.0 + 0.9)


def test_only_a_speculating_selection_estimates_thresholds() -> None:
    for speculates in (False, True):
        config = SelectionConfig(parse_policy("token-loss"), "micro-batch")
        selection = ExactSelection(config, torch.device("cpu"), speculates=speculates)
        index = torch.arange(3).view(1, 3)
        for number, losses in enumerate(([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])):
            assert not selection.begin_step(0.5, 0.5, list)
            assert selection.forward_grad_policy(number, VALID, index, None) is None
            selection.select(number, TokenBatch(torch.tensor([losses]), VALID, index, index))
        assert (selection.forward_grad_policy(2, VALID, index, None) is not None) == speculates
        assert bool(selection.state_dict()) == speculates
