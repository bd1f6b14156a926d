"""Tokens whose gradient is computed in the forward pass, while their logits are available.

A wrong choice costs time and never changes the result, as the backward pass compares it with the incoming gradient.
One rule covers every case: a token is chosen if it is valid and its score, token loss − offset, reaches a threshold.

======================  ==========================================================
CLM, or k = 1           every valid token: threshold −∞
predicted threshold     the rule of the selection itself: nothing is left to correct
speculative selection   an estimated threshold plus a band
selection known before  the selected tokens as ``valid``, threshold −∞
======================  ==========================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ForwardGradPolicy:
    """Rule for the tokens of one micro-batch."""

    valid: Tensor  # [b, s] bool
    threshold: float | Tensor = -torch.inf  # lowest chosen score; a tensor is a scalar or [b, s]
    offset: Tensor | None = None  # [b, s] fp32, subtracted from the token loss: the reference loss for excess loss

    def chosen(self, rows: slice, loss: Tensor) -> Tensor:
        """Return whether tokens are chosen, [n] bool.

        Args:
            rows: positions of n tokens in the order of the hidden states: [s, b], flat.
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
        """Return validity, threshold and offset in the order of the hidden states, [s, b], flat; cached."""
        threshold = self.threshold
        if isinstance(threshold, Tensor) and threshold.dim():
            threshold = _flat(threshold)
        return _flat(self.valid), threshold, None if self.offset is None else _flat(self.offset)


def _flat(values: Tensor) -> Tensor:
    return values.t().reshape(-1)
