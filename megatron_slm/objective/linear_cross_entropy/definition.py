"""The implementation ``torch``: the definition of linear cross-entropy, with all logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.cross_entropy import vocab_parallel_entropy, vocab_parallel_token_loss
from megatron_slm.objective.linear_cross_entropy.product import linear_in_fp32
from megatron_slm.objective.linear_cross_entropy.settings import LinearCrossEntropyConfig
from megatron_slm.objective.vocab_shard import VocabShard, gather_sequence, locate_labels, reduce_hidden_gradient
from megatron_slm.runtime.collective import all_reduce_sum


def full_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: LinearCrossEntropyConfig,
    shard: VocabShard,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return token losses and entropies as defined by :func:`linear_cross_entropy`."""
    whole = _WholeHidden.apply(hidden, config.tp_group, config.sequence_parallel)
    logits = linear_in_fp32(whole, weight)
    if config.softcap is not None:
        logits = config.softcap * torch.tanh(logits / config.softcap)
    loss = vocab_parallel_token_loss(logits, labels, config.tp_group, shard.vocab_size)
    entropy = vocab_parallel_entropy(logits.detach(), config.tp_group, shard.vocab_size) if with_entropy else None
    if config.z_loss:
        lse = loss + _label_logit(logits, labels, shard)
        term = config.z_loss * lse.square()
        loss = loss + (term - term.detach())  # a gradient without a value
    return loss, entropy


def _label_logit(logits: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    column, is_here = locate_labels(labels - shard.first, shard.size)
    label_logit = logits.gather(-1, column[..., None]).squeeze(-1)
    return _SumOverShards.apply(label_logit.masked_fill(~is_here, 0.0), shard.group)


class _WholeHidden(torch.autograd.Function):
    """Hidden states as every vocabulary shard needs them; the gradient is summed over the shards."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        whole = gather_sequence(hidden, group, sequence_parallel)
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return reduce_hidden_gradient(gradient.clone(), ctx.group, ctx.sequence_parallel), None, None


class _SumOverShards(torch.autograd.Function):
    """Sum over the group; the gradient is already the same on every rank."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup | None) -> Tensor:
        return all_reduce_sum(part.clone(), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
