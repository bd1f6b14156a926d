"""The carried threshold: selection over the global batch that knows each token's fate at once.

When a step ends, its scores are known on all ranks, and so is the exact threshold that would have selected any share
of them. The next step's threshold is that of a share which makes up for what was selected too much so far, moved on by
as much as thresholds have been moving:

    surplusₜ   = surplusₜ₋₁ + (shareₜ − kₜ)
    exactₜ(r)  = the exact threshold of step t's scores for the share r
    velocityₜ  = SMOOTHING · velocityₜ₋₁ + (1 − SMOOTHING) · (exactₜ(k) − exactₜ₋₁(k))
    threshold of step t + 1  =  exactₜ(k − GAIN · surplusₜ) + velocityₜ

Over n steps the mean share is off by the change of the surplus divided by n. Noise of a batch cancels in the surplus,
a steady drift leaves none once it is known, and a jump J of the share enters it once: J / 50 over 50 steps, so that
|J| ≤ 1/2 costs at most 1 %. It holds while the scores of a step move by less than about their spread.

Where many scores are equal to the threshold, it is not moved on, and a share of them is selected by a hash of the
token's index: ties do no harm either, and each token's fate still depends on nothing but itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.policy import terms
from megatron_slm.objective.selective_loss import (
    Carried,
    Selector,
    Tokens,
    all_reduce_counts,
    carried_selections,
    term_scores,
)
from megatron_slm.objective.threshold import key_values, largest_key, order_keys

GAIN = 0.7
SMOOTHING = 0.5
LARGEST_SURPLUS = 1.0  # what could not be helped for long is not paid back for as long
MANY_TIES = 0.001  # of the valid tokens


class CarriedThreshold:
    """The controller of one run; its state is a few numbers per term of the policy and belongs in the checkpoint.

    A threshold serves the selection ratio that it was made for. Without one (the first step, or after the ratio or
    the policy was changed on a resume) the step is selected exactly.
    """

    def __init__(self, selector: Selector, device: torch.device) -> None:
        assert selector.policy is not None
        self.selector = selector
        self.terms = list(terms(selector.policy))
        # One column per term: the threshold, the share of equal scores, the surplus, the last exact threshold, the
        # velocity, the share of all terms together, and the run's ratio that the threshold is made for. float64,
        # which holds fp32 as it is, in one message.
        self.values = torch.zeros(7, len(self.terms), dtype=torch.float64, device=device)
        self.values[-1] = torch.nan
        self.made_for = math.nan  # the last row, known without waiting for the device

    @property
    def share(self) -> float:
        """The share of the valid tokens that the last step selected."""
        return float(self.values[5, 0])

    def carried(self, ratio: float) -> Carried | None:
        """What a step with this ratio selects by; None where it must be selected exactly."""
        if self.made_for != ratio:
            return None
        threshold, tied, _, _, _, share, _ = self.values
        return Carried(threshold.float(), tied, share[0].float())

    def observe(self, tokens: Tokens, selected: Tensor, ratio: float, next_ratio: float) -> None:
        """Learn from a step that has ended. Collective over the selector's group.

        Args:
            tokens: all tokens of the step that are on this rank.
            selected: their selection, [b, s] bool.
            ratio: the step's selection ratio.
            next_ratio: that of the step to come.

        Raises:
            DivergedError: a loss of a valid token is NaN or infinite, on any rank.
        """
        _, _, surplus, before, velocity, _, _ = self.values
        reached = torch.zeros_like(surplus, dtype=torch.int64)
        if (carried := self.carried(ratio)) is not None:
            reached = torch.stack([part.sum() for part in carried_selections(tokens, self.selector, carried)])
        here = torch.cat((torch.stack((tokens.valid.sum(), selected.sum())), reached))
        counts = all_reduce_counts(tokens, here, self.selector.group)
        n_valid, n_selected, n_reached = counts.split((1, 1, len(self.terms)))
        if not n_valid:
            return  # there is nothing to learn from
        if carried is not None:
            error = n_reached / n_valid - self._shares(ratio)
            surplus = (surplus + error).clamp(-LARGEST_SURPLUS, LARGEST_SURPLUS)
        aim = self._shares(next_ratio)
        plain, made_up, needed, ties = self._exact_thresholds(tokens, n_valid, aim, aim - GAIN * surplus)
        if carried is not None:
            moved = (plain - before).nan_to_num(0.0, 0.0, 0.0)  # infinite scores
            velocity = SMOOTHING * velocity + (1 - SMOOTHING) * moved
        threshold = torch.where(ties - 1 > MANY_TIES * n_valid, made_up, made_up + velocity)
        everything = aim >= 1
        threshold, tied = threshold.masked_fill(everything, -torch.inf), (needed / ties).masked_fill(everything, 1.0)
        share, made_for = (n_selected / n_valid).expand_as(aim), torch.full_like(aim, next_ratio)
        self.values = torch.stack((threshold.float(), tied, surplus, plain, velocity, share, made_for)).double()
        self.made_for = next_ratio

    def _exact_thresholds(
        self, tokens: Tokens, n_valid: Tensor, plain: Tensor, made_up: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The exact thresholds of each term for two shares of the valid tokens, [t] float64; and for the second, how
        many of the scores that are equal to it belong to that share, and how many there are, [t] int64."""
        count = (torch.cat((plain, made_up)) * n_valid).round().long().clamp(min=1).minimum(n_valid)
        scores = torch.stack([term_scores(tokens, self.selector, term).flatten() for term in self.terms])
        rankings = len(count)
        valid = tokens.valid.reshape(1, -1).expand(rankings, -1)
        key, needed, ties = largest_key(order_keys(scores).repeat(2, 1), valid, count, self.selector.group)
        thresholds = key_values(key).double()
        half = rankings // 2
        return thresholds[:half], thresholds[half:], needed[half:], ties[half:]

    def spread(self, source: int, group: ProcessGroup) -> None:
        """Give the state of the global rank ``source``, which observed, to all ranks of a group. Collective."""
        dist.broadcast(self.values, source, group=group)
        self.made_for = float(self.values[-1, 0])

    def state_dict(self) -> dict[str, Any]:
        return {"policy": repr(self.selector.policy), "values": self.values.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stopped; what was learnt for another policy is dropped."""
        if state["policy"] == repr(self.selector.policy):
            self.values = torch.tensor(state["values"], dtype=torch.float64, device=self.values.device)
            self.made_for = float(self.values[-1, 0])

    def _shares(self, ratio: float) -> Tensor:
        shares = [term.ratio or ratio for term in self.terms]
        return torch.tensor(shares, dtype=torch.float64, device=self.values.device)
