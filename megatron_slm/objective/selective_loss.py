"""The loss of Selective Language Modeling (Rho-1, section 2.2).

    excess lossᵢ  =  token lossᵢ − reference lossᵢ                                        (scores.py)
    selectedᵢ     =  1 if i is among the ⌈k · valid⌉ tokens of the scope with the highest score    (selection/)
    SLM loss      =  Σ selectedᵢ · token lossᵢ  ÷  Σ selectedᵢ,    both summed over the global batch

This module computes the numerator and the count of one micro-batch; the trainer sums both over micro-batches and ranks
and divides once. So the loss does not depend on how a batch is split. Causal language modeling is k = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_slm.objective.selection.exact import Selection
from megatron_slm.objective.tokens import TokenBatch


@dataclass(frozen=True)
class SelectiveLoss:
    """Loss of one micro-batch as numerator and count."""

    numerator: Tensor  # scalar fp32 with its graph: Σ weightᵢ · token lossᵢ
    count: Tensor  # scalar int64: selected tokens here
    selected: Tensor  # [b, s] bool
    threshold: Tensor  # scalar fp32, of the selection


def selective_loss(tokens: TokenBatch, selection: Selection) -> SelectiveLoss:
    """Compute the micro-batch's part of the loss."""
    numerator = weighted_sum(tokens.loss, selection.weight)
    return SelectiveLoss(numerator, selection.selected.sum(), selection.selected, selection.threshold)


def weighted_sum(loss: Tensor, weight: Tensor) -> Tensor:
    """Return Σ weightᵢ · lossᵢ, a scalar; infinite or NaN losses of weight 0 are left out, as 0 · ∞ is NaN."""
    return (loss.masked_fill(weight == 0, 0.0) * weight).sum()
