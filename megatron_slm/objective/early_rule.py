"""What is known of a selection before the token losses are: which tokens may get their gradient early."""

from __future__ import annotations

from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.early import EarlySelection
from megatron_slm.objective.policy import Policy, Term, terms
from megatron_slm.objective.selective_loss import ReferenceScores, SelectiveLoss, Selector


class EarlyRule:
    """Guesses which tokens of the next micro-batch will be selected.

    Every valid token where all of them are (CLM, k = 1). With ``speculate`` also those whose score is surely above the
    threshold, for scores that rest on the token loss: guessed from the thresholds that were. Nothing otherwise.

    Args:
        selector: the selection that is guessed at.
        speculate: also guess thresholds.
    """

    def __init__(self, selector: Selector, *, speculate: bool) -> None:
        self.selector = selector
        self.speculate = speculate
        self.guess = ThresholdGuess()

    def before(self, valid: Tensor, reference: ReferenceScores | None, ratio: float) -> EarlySelection | None:
        """The rule for a micro-batch, from its loss mask [b, s] bool, its reference scores (on the last pipeline
        stage, which alone needs the rule) and the selection ratio."""
        policy = self.selector.policy
        if self.selector.mix:
            return None
        if policy is None or selects_everything(policy, ratio):
            return EarlySelection(valid)
        threshold = self.guess.sure() if self.speculate else None
        if threshold is None or not isinstance(policy, Term) or policy.stochastic:
            return None
        if policy.score == "excess" and reference is not None:
            return EarlySelection(valid, threshold, reference.loss)
        return EarlySelection(valid, threshold) if policy.score == "token-loss" else None

    def after(self, loss: SelectiveLoss) -> None:
        """Learn from what was selected of the micro-batch."""
        if self.speculate:
            self.guess.observe(loss.threshold)


def selects_everything(policy: Policy, ratio: float) -> bool:
    """Whether every valid token is selected, whatever the scores."""
    return all((term.ratio or ratio) >= 1 for term in terms(policy))


class ThresholdGuess:
    """The next micro-batch's threshold, guessed from those that were.

    The band is the mean step from one threshold to the next. A token in the band that turns out selected costs
    2HV more FLOPs than an early one, an early token that is not selected 10HV; with thresholds that scatter like a
    normal distribution, a band of about one standard deviation balances the two.
    """

    DECAY = 0.9  # of the running mean of the steps

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.step: Tensor | None = None

    def observe(self, threshold: Tensor) -> None:
        """Take in the exact threshold of a micro-batch, a scalar; kept on its device, so that nothing waits."""
        threshold = threshold.detach().clone()
        if self.last is not None:
            step = (threshold - self.last).abs()
            self.step = step if self.step is None else self.DECAY * self.step + (1 - self.DECAY) * step
        self.last = threshold

    def sure(self) -> Tensor | None:
        """The score from which on a token is taken to be surely selected; None where too little is known yet."""
        if self.last is None or self.step is None:
            return None
        return self.last + self.step
