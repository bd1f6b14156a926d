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

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HostMask = NDArray[np.bool_]
MARGIN = 1.125  # of the fixed number of rows, times the expected number of chosen ones


@dataclass(frozen=True)
class ForwardGradPolicy:
    """Rule for the tokens of one micro-batch."""

    valid: Tensor  # [b, s] bool
    threshold: float | Tensor = -torch.inf  # lowest chosen score; a tensor is a scalar or [b, s]
    offset: Tensor | None = None  # [b, s] fp32, subtracted from the token loss: the reference loss for excess loss
    share: float = 1.0  # of the tokens that a threshold is expected to choose
    valid_on_host: HostMask | None = None  # [b, s], if it is known there; only without a threshold

    def as_one_row(self) -> ForwardGradPolicy:
        """Return the rule for the same tokens in one row, [1, b * s]."""
        threshold = self.threshold
        return replace(
            self,
            valid=self.valid.reshape(1, -1),
            threshold=threshold.reshape(1, -1) if isinstance(threshold, Tensor) and threshold.dim() else threshold,
            offset=None if self.offset is None else self.offset.reshape(1, -1),
            valid_on_host=None if self.valid_on_host is None else self.valid_on_host.reshape(1, -1),
        )

    def choose(self, rows: slice, loss: Tensor, *, fixed_size: bool) -> tuple[Tensor, Tensor]:
        """Return the chosen tokens among ``rows``, [p] int64, ascending, and whether each is one, [p] bool.

        The number of chosen tokens is read from the device if the host does not know them. With ``fixed_size``, the
        host expects a number instead: surplus tokens are left to the backward pass, and missing ones are filled up by
        tokens that are not chosen.
        """
        chosen = self.chosen(rows, loss)
        if self._host_in_order is not None:
            indices = torch.from_numpy(np.flatnonzero(self._host_in_order[rows]))
            indices = indices.to(loss.device, non_blocking=True)
        elif fixed_size:
            size = len(loss)
            rank = torch.where(chosen, 0, torch.where(loss.isfinite(), size, 2 * size))
            order = (rank + torch.arange(size, device=loss.device)).argsort()
            indices = order[: math.ceil(min(1.0, MARGIN * self.share) * size)].sort().values
        else:
            indices = chosen.nonzero().squeeze(1)
        return indices, chosen[indices]

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

    @cached_property
    def _host_in_order(self) -> HostMask | None:
        return None if self.valid_on_host is None else self.valid_on_host.T.reshape(-1)


def _flat(values: Tensor) -> Tensor:
    return values.t().reshape(-1)
