"""Vocabulary and sequence shards of a rank, and communication between tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.runtime.collective import all_reduce_sum, group_rank, group_size


@dataclass(frozen=True)
class VocabShard:
    """Vocabulary shard of this rank: entries first .. first + size, of which the leading ones are no padding."""

    group: ProcessGroup | None
    first: int
    size: int
    unpadded_size: int
    vocab_size: int  # of all shards, without padding

    @classmethod
    def from_size(cls, size: int, group: ProcessGroup | None, vocab_size: int | None) -> VocabShard:
        """Return this rank's shard among shards of ``size`` entries; without ``vocab_size`` there is no padding."""
        first = size * group_rank(group)
        vocab_size = size * group_size(group) if vocab_size is None else vocab_size
        return cls(group, first, size, min(max(vocab_size - first, 0), size), vocab_size)


def locate_labels(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the column of each label, 0 if it is outside of a shard or chunk, and whether it is inside.

    Args:
        labels: [...] int64, counted from the first entry of the shard or chunk.
        width: number of its entries.
    """
    is_inside = (labels >= 0) & (labels < width)
    return labels * is_inside, is_inside


def gather_sequence(hidden: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Return hidden states of all tokens [s, b, h], gathered with sequence parallelism."""
    if not sequence_parallel or group_size(group) == 1:
        return hidden
    whole = hidden.new_empty(hidden.size(0) * group_size(group), *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def reduce_hidden_gradient(gradient: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Return the sum of the shards' gradients [s, b, h], scattered with sequence parallelism."""
    if group_size(group) == 1:
        return gradient
    if not sequence_parallel:
        return all_reduce_sum(gradient, group)
    part = gradient.new_empty(gradient.size(0) // group_size(group), *gradient.shape[1:])
    dist.reduce_scatter_tensor(part, gradient, group=group)
    return part
