"""Which tokens may get their gradient while their logits are at hand, before the selection is known.

Such a guess costs time where it is wrong and never changes the result, as the backward pass compares it with the
gradient that really arrives. One rule covers every case: a token is early where it is valid and its score, sign ·
token loss − offset, is at least a threshold.

======================  ==========================================================
CLM, or k = 1           every valid token: threshold −∞
carried threshold       the rule of the selection itself: nothing is left to correct
speculative selection   a guess of the threshold, plus a band: what is surely selected
selection known before  the selected tokens as ``valid``, threshold −∞
======================  ==========================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EarlySelection:
    """The rule for the tokens of one micro-batch."""

    valid: Tensor  # [b, s] bool
    threshold: float | Tensor = -torch.inf  # lowest early score; a tensor is a scalar or [b, s]
    offset: Tensor | None = None  # [b, s] fp32, subtracted from the token loss: the reference loss for excess loss

    def chosen(self, rows: slice, loss: Tensor) -> Tensor:
        """Whether tokens are early, [n] bool.

        Args:
            rows: places of n tokens in the order of the hidden states: [s, b], flat.
            loss: [n] fp32, their token losses.
        """
        valid = _in_order(self.valid)[rows]
        if isinstance(self.threshold, float) and self.threshold == -torch.inf:
            return valid
        score = loss if self.offset is None else loss - _in_order(self.offset)[rows]
        threshold = self.threshold
        if isinstance(threshold, Tensor) and threshold.dim():
            threshold = _in_order(threshold)[rows]
        return valid & (score >= threshold)


def _in_order(values: Tensor) -> Tensor:
    """[b, s] as the hidden states lie: [s, b], flat."""
    return values.t().reshape(-1)
