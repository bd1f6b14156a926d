"""This rank's part of the vocabulary and of the sequence, and what the tensor-parallel ranks tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.threshold import all_reduce_sum


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


@dataclass
class Statistics:
    """Running figures of n rows of logits; each [n] fp32."""

    lse: Tensor  # log of the sum of exponentials so far
    label_logit: Tensor  # 0 where the label is elsewhere
    mean: Tensor | None  # expected logit under the softmax so far; for the entropy

    @classmethod
    def empty(cls, rows: int, device: torch.device, with_mean: bool) -> Statistics:
        """Of no logits yet."""
        lse = torch.full((rows,), -torch.inf, device=device)
        return cls(lse, torch.zeros_like(lse), torch.zeros_like(lse) if with_mean else None)

    @classmethod
    def joined(cls, parts: Sequence[Statistics]) -> Statistics:
        """The figures of blocks of rows, one below the other, as those of all rows; at least one block."""
        means = [part.mean for part in parts if part.mean is not None]
        return cls(
            torch.cat([part.lse for part in parts]),
            torch.cat([part.label_logit for part in parts]),
            torch.cat(means) if means else None,
        )

    def merge(self, other: Statistics) -> None:
        """Take in the figures of further logits of the same rows; at least one logit of each."""
        lse = torch.logaddexp(self.lse, other.lse)
        if self.mean is not None and other.mean is not None:
            self.mean = self.mean * (self.lse - lse).exp() + other.mean * (other.lse - lse).exp()
        self.lse = lse
        self.label_logit += other.label_logit

    def reduce(self, group: ProcessGroup | None) -> None:
        """Take in the other ranks' shards of the same rows: one all-reduce of [n], one of [2, n] or [3, n]."""
        if group is None or group.size() == 1:
            return
        highest = self.lse.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        total = (self.lse - highest).exp()
        parts = [total, self.label_logit] + ([total * self.mean] if self.mean is not None else [])
        sums = all_reduce_sum(torch.stack(parts), group)
        self.lse = highest + sums[0].log()
        self.label_logit = sums[1]
        if self.mean is not None:
            self.mean = sums[2] / sums[0]


def gather_sequence(hidden: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Hidden states of all tokens [s, b, h], from this rank's part of the sequence where it is cut."""
    if not sequence_parallel or group is None or group.size() == 1:
        return hidden
    whole = hidden.new_empty(hidden.size(0) * group.size(), *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def reduce_hidden_gradient(gradient: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """The sum of the vocabulary shards' gradients [s, b, h]; this rank's part of it where the sequence is cut."""
    if group is None or group.size() == 1:
        return gradient
    if not sequence_parallel:
        return all_reduce_sum(gradient, group)
    part = gradient.new_empty(gradient.size(0) // group.size(), *gradient.shape[1:])
    dist.reduce_scatter_tensor(part, gradient, group=group)
    return part
