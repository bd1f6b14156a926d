"""Which tokens may get their gradient early, for every kind of selection."""

from __future__ import annotations

import pytest
import torch

from megatron_slm.objective.early_rule import EarlyRule, ThresholdGuess
from megatron_slm.objective.policy import parse_policy
from megatron_slm.objective.selective_loss import ReferenceScores, SelectiveLoss, Selector

VALID = torch.tensor([[True, False, True]])
REFERENCE = ReferenceScores(torch.tensor([[1.0, 2.0, 3.0]]))


def observed(threshold: float) -> SelectiveLoss:
    return SelectiveLoss(torch.zeros(()), torch.zeros(()), VALID, torch.tensor(threshold))


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
