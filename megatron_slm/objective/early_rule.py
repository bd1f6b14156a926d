"""What is known of a selection before the token losses are: which tokens may get their gradient early."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.early import EarlySelection
from megatron_slm.objective.policy import Policy, Term, terms
from megatron_slm.objective.selective_loss import ReferenceScores, Selection, Selector


class EarlyRule:
    """Tells or guesses which tokens of the next micro-batch will be selected.

    Every valid token where all of them are (CLM, k = 1). The selected ones where the selection is known before the
    forward pass, and where a carried threshold decides. With ``speculate``, else, those whose score is surely above
    the threshold, guessed from the thresholds that were. Thresholds tell of one score that rests on the token loss
    without noise; nothing is told of other scores, nor with a mix, under which every token has a gradient.

    Args:
        selector: the selection that is guessed at.
        speculate: also guess thresholds.
    """

    def __init__(self, selector: Selector, *, speculate: bool) -> None:
        self.selector = selector
        self.speculate = speculate
        self.guess = ThresholdGuess()

    def before(
        self,
        valid: Tensor,
        reference: ReferenceScores | None,
        ratio: float,
        *,
        selection: Selection | None = None,
        lowest: Tensor | None = None,
    ) -> EarlySelection | None:
        """The rule for a micro-batch.

        Args:
            valid: [b, s] bool, the loss mask.
            reference: its reference scores.
            ratio: the selection ratio.
            selection: that of the micro-batch, where it is known before its losses.
            lowest: [b, s] fp32, the score from which on each token is selected, where a carried threshold tells.
        """
        policy = self.selector.policy
        if self.selector.mix:
            return None
        if policy is None or selects_everything(policy, ratio):
            return EarlySelection(valid)
        if selection is not None:
            return EarlySelection(selection.selected)
        threshold = lowest
        if threshold is None and self.speculate:
            threshold = self.guess.sure()
        if threshold is None or not isinstance(policy, Term) or policy.stochastic:
            return None
        if policy.score == "excess" and reference is not None:
            return EarlySelection(valid, threshold, reference.loss)
        return EarlySelection(valid, threshold) if policy.score == "token-loss" else None

    def after(self, selection: Selection) -> None:
        """Learn from the selection of a micro-batch that waited for its losses."""
        if self.speculate:
            self.guess.observe(selection.threshold)


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

    def state_dict(self) -> dict[str, float | None]:
        """What a run needs that goes on as if it had not stopped: what is early has a part in the last bits."""
        return {name: None if value is None else float(value) for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, float | None], device: torch.device) -> None:
        for name in vars(self):
            value = state[name]
            setattr(self, name, None if value is None else torch.tensor(value, device=device))

    def sure(self) -> Tensor | None:
        """The score from which on a token is taken to be surely selected; None where too little is known yet."""
        if self.last is None or self.step is None:
            return None
        return self.last + self.step
