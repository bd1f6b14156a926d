"""Which tokens may get their gradient early, for every kind of selection."""

from __future__ import annotations

import pytest
import torch

from megatron_slm.objective.early_rule import EarlyRule, ThresholdGuess
from megatron_slm.objective.policy import parse_policy
from megatron_slm.objective.selective_loss import (
    Carried,
    ReferenceScores,
    Selection,
    Selector,
    Tokens,
    carried_lowest,
    select_carried,
)

VALID = torch.tensor([[True, False, True]])
REFERENCE = ReferenceScores(torch.tensor([[1.0, 2.0, 3.0]]))


def observed(threshold: float) -> Selection:
    return Selection(VALID, VALID.float(), torch.tensor(threshold))


@pytest.mark.parametrize(
    ("score", "ratio"), [(None, 0.6), ("excess", 1.0), ("random", 1.0), ("excess:1.0 and random:1.0", 0.5)]
)
def test_everything_selected_is_known_at_once(score: str | None, ratio: float) -> None:
    policy = None if score is None else parse_policy(score)
    early = EarlyRule(Selector(policy), speculate=False).before(VALID, REFERENCE, ratio)
    assert early is not None
    assert early.chosen(slice(0, 3), torch.zeros(3)).tolist() == [True, False, True]
    assert EarlyRule(Selector(policy, mix=0.1), speculate=False).before(VALID, REFERENCE, ratio) is None


@pytest.mark.parametrize("score", ["excess", "token-loss"])
def test_speculation_waits_for_two_thresholds_and_keeps_a_band(score: str) -> None:
    rule = EarlyRule(Selector(parse_policy(score)), speculate=True)
    for threshold in (2.0, 1.5):
        assert rule.before(VALID, REFERENCE, 0.6) is None
        rule.after(observed(threshold))
    early = rule.before(VALID, REFERENCE, 0.6)  # the last threshold, 1.5, plus the step of 0.5
    offset = 3.0 if score == "excess" else 0.0
    assert early is not None
    for loss, chosen in ((2.01, True), (1.99, False)):
        assert early.chosen(slice(2, 3), torch.tensor([loss + offset])).tolist() == [chosen]
    assert early.chosen(slice(1, 2), torch.tensor([99.0])).tolist() == [False], "an invalid token"


@pytest.mark.parametrize("score", ["random", "reference-loss", "stochastic-excess", "excess and random"])
def test_no_guess_where_the_score_does_not_rest_on_the_loss_alone(score: str) -> None:
    rule = EarlyRule(Selector(parse_policy(score)), speculate=True)
    for threshold in (2.0, 1.5):
        rule.after(observed(threshold))
    assert rule.before(VALID, REFERENCE, 0.6) is None
    assert EarlyRule(Selector(parse_policy("excess")), speculate=True).before(VALID, None, 0.6) is None


@pytest.mark.parametrize("score", ["excess", "token-loss"])
@pytest.mark.parametrize("tied", [0.0, 0.4, 1.0])
def test_a_carried_threshold_tells_the_selection_itself(score: str, tied: float) -> None:
    """Also where many scores are equal to it, in the order of the hidden states."""
    chance = torch.Generator().manual_seed(3)
    reference = ReferenceScores(torch.randint(0, 3, (4, 50), generator=chance) / 2)
    loss = reference.loss + torch.randint(-2, 3, (4, 50), generator=chance) / 4
    index = torch.arange(1000, 1200).view(4, 50)
    tokens = Tokens(loss, torch.rand(4, 50, generator=chance) < 0.8, index, index, reference)
    carried = Carried(torch.tensor([0.25]), torch.tensor([tied], dtype=torch.float64), torch.tensor(0.6))
    selector = Selector(parse_policy(score), "global-batch")
    (lowest,) = carried_lowest(index, selector, carried)
    early = EarlyRule(selector, speculate=False).before(tokens.valid, reference, 0.6, lowest=lowest)
    selected = select_carried(tokens, selector, carried).selected
    score_of = loss - reference.loss if score == "excess" else loss
    at_threshold = tokens.valid & (score_of == 0.25)
    assert torch.equal(selected & ~at_threshold, tokens.valid & (score_of > 0.25))
    assert float(selected[at_threshold].float().mean()) == pytest.approx(tied, abs=0.25)
    assert early is not None
    assert torch.equal(early.chosen(slice(0, 200), loss.t().reshape(-1)), selected.t().reshape(-1))


@pytest.mark.parametrize("score", ["excess", "random", "stochastic-excess", "excess and random"])
def test_a_known_selection_needs_no_losses(score: str) -> None:
    selection = Selection(torch.tensor([[True, False, False]]), torch.ones(1, 3), torch.zeros(()))
    early = EarlyRule(Selector(parse_policy(score)), speculate=True).before(VALID, None, 0.6, selection=selection)
    assert early is not None
    assert early.chosen(slice(0, 3), torch.full((3,), 9.0)).tolist() == [True, False, False]
    assert EarlyRule(Selector(parse_policy(score), mix=0.1), speculate=False).before(VALID, None, 0.6) is None


@pytest.mark.parametrize("score", ["random", "reference-loss", "stochastic-excess", "excess and random"])
def test_carried_thresholds_of_other_scores_tell_nothing_early(score: str) -> None:
    lowest = torch.zeros(1, 3)
    assert (
        EarlyRule(Selector(parse_policy(score)), speculate=False).before(VALID, REFERENCE, 0.6, lowest=lowest) is None
    )
    everything = EarlyRule(Selector(parse_policy(score)), speculate=False).before(VALID, REFERENCE, 1.0, lowest=lowest)
    assert everything is not None
    assert everything.chosen(slice(0, 3), torch.zeros(3)).tolist() == VALID[0].tolist()


def test_nothing_is_guessed_without_being_asked() -> None:
    rule = EarlyRule(Selector(parse_policy("excess")), speculate=False)
    for threshold in (2.0, 1.5):
        rule.after(observed(threshold))
    assert rule.before(VALID, REFERENCE, 0.6) is None


def test_the_band_follows_the_steps_of_the_threshold() -> None:
    guess = ThresholdGuess()
    for threshold in (1.0, 2.0, 2.0):
        guess.observe(torch.tensor(threshold))
    assert float(guess.sure()) == pytest.approx(2.0 + 0.9)
