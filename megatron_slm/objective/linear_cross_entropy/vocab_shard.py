"""Vocabulary and sequence shards of a rank, and communication between tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.cross_entropy import LOWEST_LOGIT
from megatron_slm.runtime.collective import all_reduce_sum


@dataclass(frozen=True)
class Shard:
    """A vocabulary shard: entries first .. first + size, of which the leading ``real`` are no padding."""

    group: ProcessGroup | None
    first: int
    size: int
    real: int
    vocab_size: int  # of all shards, without padding

    @classmethod
    def of(cls, weight: Tensor, group: ProcessGroup | None, vocab_size: int | None) -> Shard:
        """The shard that ``weight`` [V / tp, h] is, on this rank of ``group``."""
        size, rank, ranks = weight.size(0), 0, 1
        if group is not None:
            rank, ranks = group.rank(), group.size()
        whole = size * ranks if vocab_size is None else vocab_size
        return cls(group, rank * size, size, min(max(whole - rank * size, 0), size), whole)

    @property
    def ranks(self) -> int:
        return self.group.size() if self.group is not None else 1


class Partition(NamedTuple):
    """The normaliser of the softmax over n rows of logits, total x exp(highest); both [n] fp32."""

    highest: Tensor
    total: Tensor

    def select(self, rows: Tensor) -> Partition:
        """Return that of some rows [p] int64."""
        return Partition(self.highest[rows], self.total[rows])


class GradientRows(NamedTuple):
    """Factors of the gradient of n rows of logits: scale x exp(logit - highest), minus weight at the label."""

    highest: Tensor  # [n] fp32, as the next two
    scale: Tensor
    weight: Tensor

    @classmethod
    def of(cls, partition: Partition, weight: Tensor, z_loss: float) -> GradientRows:
        """Return the factors for weight x (loss + z_loss x lse^2) of each row; weight [n] fp32."""
        scale = weight / partition.total
        if z_loss:
            scale = scale * (1 + 2 * z_loss * (partition.highest + partition.total.log()))
        return cls(partition.highest, scale, weight)

    def select(self, rows: slice) -> GradientRows:
        """Return the factors of some rows."""
        return GradientRows(*(values[rows] for values in self))


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
    def joined(cls, parts: Sequence[Statistics]) -> Statistics:
        """Concatenate the rows of at least one part."""
        weighted = [part.weighted for part in parts if part.weighted is not None]
        return cls(
            torch.cat([part.highest for part in parts]),
            torch.cat([part.total for part in parts]),
            torch.cat([part.label_logit for part in parts]),
            torch.cat(weighted) if weighted else None,
        )

    @property
    def partition(self) -> Partition:
        """The softmax's normaliser."""
        return Partition(self.highest, self.total)

    @property
    def loss(self) -> Tensor:
        """-log p(label)."""
        return self.total.log() + (self.highest - self.label_logit)

    @property
    def entropy(self) -> Tensor | None:
        """Entropy of the softmax in nats."""
        return None if self.weighted is None else self.total.log() - self.weighted / self.total

    def merge(self, other: Statistics) -> None:
        """Add the sums over further logits of the same rows."""
        highest = torch.maximum(self.highest, other.highest)
        mine, theirs = self._relative_to(highest), other._relative_to(highest)
        self.highest, self.total = highest, mine.total + theirs.total
        self.label_logit = self.label_logit + other.label_logit
        if mine.weighted is not None and theirs.weighted is not None:
            self.weighted = mine.weighted + theirs.weighted

    def reduce(self, group: ProcessGroup | None) -> None:
        """Add the sums over the other ranks' shards: one all-reduce of [n], one of [2, n] or [3, n]."""
        if group is None or group.size() == 1:
            return
        highest = self.highest.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
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


def gather_sequence(hidden: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Return hidden states of all tokens [s, b, h], gathered with sequence parallelism."""
    if not sequence_parallel or group is None or group.size() == 1:
        return hidden
    whole = hidden.new_empty(hidden.size(0) * group.size(), *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def reduce_hidden_gradient(gradient: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Return the sum of the shards' gradients [s, b, h], scattered with sequence parallelism."""
    if group is None or group.size() == 1:
        return gradient
    if not sequence_parallel:
        return all_reduce_sum(gradient, group)
    part = gradient.new_empty(gradient.size(0) // group.size(), *gradient.shape[1:])
    dist.reduce_scatter_tensor(part, gradient, group=group)
    return part
