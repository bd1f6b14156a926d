"""Softmax over rows of logits in chunks and shards: statistics, normalizer, gradient factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.cross_entropy import LOWEST_LOGIT
from megatron_slm.runtime.collective import all_reduce_max, all_reduce_sum, group_size


class SoftmaxNormalizer(NamedTuple):
    """Normalizer of the softmax over n rows of logits, total x exp(highest); both [n] fp32."""

    highest: Tensor
    total: Tensor

    def select(self, row_indices: Tensor) -> SoftmaxNormalizer:
        """Return the normalizer of the given rows, [p] int64."""
        return SoftmaxNormalizer(self.highest[row_indices], self.total[row_indices])


class GradientFactors(NamedTuple):
    """Factors of the gradient of n rows of logits: scale x exp(logit - highest), minus loss_weight at the label."""

    highest: Tensor  # [n] fp32, as the next two
    scale: Tensor
    loss_weight: Tensor

    @classmethod
    def from_normalizer(cls, normalizer: SoftmaxNormalizer, loss_weight: Tensor, z_loss: float) -> GradientFactors:
        """Return the factors for loss_weight x (loss + z_loss x lse^2) of each row; loss_weight [n] fp32."""
        scale = loss_weight / normalizer.total
        if z_loss:
            scale = scale * (1 + 2 * z_loss * (normalizer.highest + normalizer.total.log()))
        return cls(normalizer.highest, scale, loss_weight)

    def select(self, rows: slice) -> GradientFactors:
        """Return the factors of the given rows."""
        return GradientFactors(*(values[rows] for values in self))


@dataclass
class Statistics:
    """Running sums of the softmax over n rows of logits; each [n] fp32.

    Sums are relative to the largest logit so far, so that an offset that all logits of a row share costs no digits.
    """

    highest: Tensor  # largest logit; -inf before the first
    total: Tensor  # sum of exp(logit - highest)
    label_logit: Tensor  # 0 if the label is elsewhere
    weighted: Tensor | None  # sum of exp(logit - highest) x (logit - highest); for the entropy

    @classmethod
    def empty(cls, rows: int, device: torch.device, with_entropy: bool) -> Statistics:
        """Return the sums over no logits."""
        zeros = torch.zeros(rows, device=device)
        return cls(torch.full_like(zeros, -torch.inf), zeros, zeros.clone(), zeros.clone() if with_entropy else None)

    @classmethod
    def concat(cls, parts: Sequence[Statistics]) -> Statistics:
        """Concatenate the rows of at least one part."""
        weighted = [part.weighted for part in parts if part.weighted is not None]
        return cls(
            torch.cat([part.highest for part in parts]),
            torch.cat([part.total for part in parts]),
            torch.cat([part.label_logit for part in parts]),
            torch.cat(weighted) if weighted else None,
        )

    @property
    def normalizer(self) -> SoftmaxNormalizer:
        """Return the normalizer of the softmax."""
        return SoftmaxNormalizer(self.highest, self.total)

    @property
    def loss(self) -> Tensor:
        """Return -log p(label)."""
        return self.total.log() + (self.highest - self.label_logit)

    @property
    def entropy(self) -> Tensor | None:
        """Return the entropy of the softmax in nats."""
        return None if self.weighted is None else self.total.log() - self.weighted / self.total

    def merge(self, other: Statistics) -> None:
        """Add the sums over more logits of the same rows."""
        highest = torch.maximum(self.highest, other.highest)
        mine, theirs = self._relative_to(highest), other._relative_to(highest)
        self.highest, self.total = highest, mine.total + theirs.total
        self.label_logit = self.label_logit + other.label_logit
        if mine.weighted is not None and theirs.weighted is not None:
            self.weighted = mine.weighted + theirs.weighted

    def reduce(self, group: ProcessGroup | None) -> None:
        """Add the sums over the other ranks' shards: one all-reduce of [n], one of [2, n] or [3, n]."""
        if group_size(group) == 1:
            return
        highest = all_reduce_max(self.highest.clone(), group)
        mine = self._relative_to(highest)
        parts = [mine.total, mine.label_logit] + ([mine.weighted] if mine.weighted is not None else [])
        self.highest, (self.total, self.label_logit, *weighted) = highest, all_reduce_sum(torch.stack(parts), group)
        self.weighted = weighted[0] if weighted else None

    def _relative_to(self, highest: Tensor) -> Statistics:
        """Rescale the sums to a larger logit; rows that have seen no finite logit add nothing."""
        shift = torch.where(self.highest == highest, 0.0, self.highest - highest).clamp(min=LOWEST_LOGIT)
        scale = shift.exp()
        weighted = None if self.weighted is None else scale * (self.weighted + self.total * shift)
        return Statistics(highest, self.total * scale, self.label_logit, weighted)
