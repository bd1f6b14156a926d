"""Cross-entropy and entropy of vocabulary-sharded logits, with work in the backward pass for selected rows only.

The logits of a token are sharded over the tensor-parallel ranks by vocabulary. The maximum, the sum of exponentials
and the label's logit are all-reduced; no rank holds a complete row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.vocab_shard import VocabShard, locate_labels
from megatron_slm.runtime.collective import all_reduce_max, all_reduce_sum

LOWEST_LOGIT = -1000.0  # below the maximum of its row; its exponential is 0 in fp32


def vocab_parallel_token_loss(
    logits: Tensor, labels: Tensor, group: ProcessGroup | None, vocab_size: int | None = None
) -> Tensor:
    """Return token losses -log p(label), natural log.

    Padding entries of the vocabulary have probability 0, so that the loss is independent of the padding and thus of
    the number of tensor-parallel ranks.

    The backward pass computes gradients for the rows whose incoming gradient is not zero, which are the selected
    tokens; all other rows get exact zeros without any arithmetic.

    Args:
        logits: [..., V / tp], fp32 or bf16, this rank's vocabulary shard; not modified.
        labels: [...] int64, ids in the full vocabulary.
        group: tensor-parallel ranks in the order of their shards; None if the vocabulary is not sharded.
        vocab_size: vocabulary size before padding; None without padding.

    Returns:
        [...] fp32, the same on every rank of the group.

    Raises:
        ValueError: a label on the host is outside the vocabulary; on a GPU its loss is NaN.
    """
    return _TokenLoss.apply(logits, labels, VocabShard.from_size(logits.size(-1), group, vocab_size))


def vocab_parallel_entropy(logits: Tensor, group: ProcessGroup | None, vocab_size: int | None = None) -> Tensor:
    """Return the entropy of softmax(logits) in nats: log Z - E[logit]. Forward only; arguments and result as above."""
    with torch.no_grad():
        shifted = _shifted_logits(logits, VocabShard.from_size(logits.size(-1), group, vocab_size))
        weights = shifted.exp()
        shifted.clamp_(min=LOWEST_LOGIT)  # 0 · -inf would be NaN
        sums = torch.stack((weights.sum(-1), (weights * shifted).sum(-1)))
        total, weighted = all_reduce_sum(sums, group)
        return total.log() - weighted / total


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
        check_labels(labels, shard.vocab_size)
        shifted = _shifted_logits(logits, shard)
        column, is_here = locate_labels(labels - shard.first, shard.size)
        label_logit = shifted.gather(-1, column[..., None]).squeeze(-1).masked_fill(~is_here, 0.0)
        exponentials = shifted.exp_()
        label_logit, total = all_reduce_sum(torch.stack((label_logit, exponentials.sum(-1))), shard.group)
        ctx.save_for_backward(exponentials, total, column, is_here)
        ctx.logits_dtype = logits.dtype
        return mark_outside_labels(total.log() - label_logit, labels, shard.vocab_size)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        exponentials, total, column, is_here = ctx.saved_tensors
        gradient = torch.zeros(exponentials.shape, dtype=ctx.logits_dtype, device=exponentials.device)
        rows = grad_loss.nonzero(as_tuple=True)
        loss_weight = grad_loss[rows]
        selected = exponentials[rows].mul_((loss_weight / total[rows])[:, None])
        selected.scatter_add_(1, column[rows][:, None], (-loss_weight * is_here[rows])[:, None])
        gradient[rows] = selected.to(ctx.logits_dtype)
        return gradient, None, None


def _shifted_logits(logits: Tensor, shard: VocabShard) -> Tensor:
    """Return an fp32 copy of the logits minus the maximum of their global row; -inf for padding entries."""
    if shard.unpadded_size:
        highest = logits[..., : shard.unpadded_size].amax(-1).float()
    else:
        highest = torch.full(logits.shape[:-1], -torch.inf, device=logits.device)
    shifted = logits.float() - all_reduce_max(highest, shard.group)[..., None]
    if shard.unpadded_size < shard.size:
        shifted[..., shard.unpadded_size :] = -torch.inf
    return shifted


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a label on the host is outside the vocabulary."""
    if labels.device.type != "cpu" or not labels.numel():
        return  # the check would wait for the GPU, see mark_outside_labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"a label is {low if low < 0 else high}, and the vocabulary has {vocab_size} entries")


def mark_outside_labels(loss: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Return the losses with NaN for labels on a GPU that are outside the vocabulary: a run ends with their positions.

    Args:
        loss: [...] fp32.
        labels: [...] int64; those on the host have been checked.
    """
    if labels.device.type == "cpu":
        return loss
    return loss.masked_fill((labels < 0) | (labels >= vocab_size), torch.nan)
