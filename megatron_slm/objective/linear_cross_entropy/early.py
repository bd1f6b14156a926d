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
from functools import cached_property

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
        valid, threshold, offset = self._in_order
        if isinstance(threshold, float) and threshold == -torch.inf:
            return valid[rows]
        score = loss if offset is None else loss - offset[rows]
        if isinstance(threshold, Tensor) and threshold.dim():
            threshold = threshold[rows]
        return valid[rows] & (score >= threshold)

    @cached_property
    def _in_order(self) -> tuple[Tensor, float | Tensor, Tensor | None]:
        """Validity, threshold and offset as the hidden states lie, [s, b], flat: once, as every block asks."""
        threshold = self.threshold
        if isinstance(threshold, Tensor) and threshold.dim():
            threshold = _flat(threshold)
        return _flat(self.valid), threshold, None if self.offset is None else _flat(self.offset)


def _flat(values: Tensor) -> Tensor:
    return values.t().reshape(-1)
