"""The carried threshold: selection over the global batch that knows each token's fate at once.

When a step ends, its scores are known on all ranks, and so is the exact threshold that would have selected a share r
of them. The next step selects what reaches that threshold. Its share misses k by as much as the scores have moved
since, so the share to aim at is corrected by what was selected too much so far:

    surplusₜ    = surplusₜ₋₁ + (shareₜ − kₜ)
    thresholdₜ₊₁ = exact threshold of the scores of step t for the share  kₜ₊₁ − GAIN · surplusₜ

This is integral control. Noise of a batch cancels in the surplus, a steady drift d of the share leaves a constant
surplus d / GAIN, and a jump J enters it once. So over any n steps the mean share is off by the change of the surplus
divided by n. A jump that moves the share by J ≤ 1/2 in one step costs J / 50 over 50 steps: at most 1 %.

Of scores that are equal to the threshold, a share is selected by a hash of the token's index, so that ties do no harm
either, and each token's fate still depends on nothing but itself.
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

GAIN = 0.25
LARGEST_SURPLUS = 0.5  # what cannot be helped for a while, such as equal scores, is not paid back for ever


class CarriedThreshold:
    """The controller of one run; its state is five numbers per term of the policy and belongs in the checkpoint.

    A threshold serves the selection ratio that it was made for. Without one (the first step, or after the ratio or
    the policy was changed on a resume) the step is selected exactly.
    """

    def __init__(self, selector: Selector, device: torch.device) -> None:
        assert selector.policy is not None
        self.selector = selector
        self.terms = list(terms(selector.policy))
        # One column per term: the threshold, the share of equal scores, the surplus, the share of all terms together,
        # and the run's ratio that the threshold is made for. float64, which holds fp32 as it is, in one message.
        self.values = torch.zeros(5, len(self.terms), dtype=torch.float64, device=device)
        self.values[4] = torch.nan
        self.made_for = math.nan  # the last row, known without waiting for the device

    def carried(self, ratio: float) -> Carried | None:
        """What a step with this ratio selects by; None where it must be selected exactly."""
        if self.made_for != ratio:
            return None
        thresholds, tied, _, share, _ = self.values
        return Carried(thresholds.float(), tied, share[0].float())

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
        group, surplus = self.selector.group, self.values[2]
        reached = torch.zeros_like(surplus, dtype=torch.int64)
        if (carried := self.carried(ratio)) is not None:
            parts = carried_selections(tokens, self.selector, carried)
            reached = torch.stack([part.sum() for part in parts])
        here = torch.cat((torch.stack((tokens.valid.sum(), selected.sum())), reached))
        n_valid, n_selected, n_reached = all_reduce_counts(tokens, here, group).split((1, 1, len(self.terms)))
        if not n_valid:
            return  # there is nothing to learn from
        if carried is not None:
            error = n_reached / n_valid - self._shares(ratio)
            surplus = (surplus + error).clamp(-LARGEST_SURPLUS, LARGEST_SURPLUS)
        wanted = self._shares(next_ratio)
        count = ((wanted - GAIN * surplus) * n_valid).round().long().clamp(min=1).minimum(n_valid)
        scores = torch.stack([term_scores(tokens, self.selector, term).flatten() for term in self.terms])
        valid = tokens.valid.reshape(1, -1).expand(len(self.terms), -1)
        key, needed, ties = largest_key(order_keys(scores), valid, count, group)
        everything = wanted >= 1
        thresholds = key_values(key).double().masked_fill(everything, -torch.inf)
        tied = (needed / ties).double().masked_fill(everything, 1.0)
        share = (n_selected / n_valid).expand_as(surplus)
        self.values = torch.stack((thresholds, tied, surplus, share, torch.full_like(surplus, next_ratio)))
        self.made_for = next_ratio

    def spread(self, source: int, group: ProcessGroup) -> None:
        """Give the state of the global rank ``source``, which observed, to all ranks of a group. Collective."""
        dist.broadcast(self.values, source, group=group)
        self.made_for = float(self.values[4, 0])

    def state_dict(self) -> dict[str, Any]:
        return {"policy": repr(self.selector.policy), "values": self.values.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stopped; what was learnt for another policy is dropped."""
        if state["policy"] == repr(self.selector.policy):
            self.values = torch.tensor(state["values"], dtype=torch.float64, device=self.values.device)
            self.made_for = float(self.values[4, 0])

    def _shares(self, ratio: float) -> Tensor:
        shares = [term.ratio or ratio for term in self.terms]
        return torch.tensor(shares, dtype=torch.float64, device=self.values.device)
