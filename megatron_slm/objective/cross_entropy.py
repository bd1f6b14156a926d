"""Cross-entropy and entropy of vocabulary-sharded logits, with work in the backward pass for selected rows only.

The logits of a token are sharded over the tensor-parallel ranks by vocabulary. The maximum, the sum of exponentials
and the label's logit are all-reduced; no rank holds a complete row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.runtime.collective import all_reduce_sum

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
        ValueError: a label is outside the vocabulary.
    """
    return _TokenLoss.apply(logits, labels, group, vocab_size)


def vocab_parallel_entropy(logits: Tensor, group: ProcessGroup | None, vocab_size: int | None = None) -> Tensor:
    """Return the entropy of softmax(logits) in nats: log Z - E[logit]. Forward only; arguments and result as above."""
    with torch.no_grad():
        shifted = _shifted_logits(logits, group, vocab_size)
        weights = shifted.exp()
        shifted.clamp_(min=LOWEST_LOGIT)  # 0 · -inf would be NaN
        sums = torch.stack((weights.sum(-1), (weights * shifted).sum(-1)))
        total, weighted = all_reduce_sum(sums, group)
        return total.log() - weighted / total


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup | None, vocab_size: int | None) -> Tensor:
        shard = logits.size(-1)
        check_labels(labels, vocab_size or shard * (group.size() if group is not None else 1))
        shifted = _shifted_logits(logits, group, vocab_size)
        here = labels - _rank(group) * shard
        elsewhere = (here < 0) | (here >= shard)
        here = here.masked_fill(elsewhere, 0)

        label_logit = shifted.gather(-1, here[..., None]).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = shifted.exp_()
        label_logit, total = all_reduce_sum(torch.stack((label_logit, exponentials.sum(-1))), group)
        ctx.save_for_backward(exponentials, total, here, elsewhere)
        ctx.logits_dtype = logits.dtype
        return total.log() - label_logit

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials, total, here, elsewhere = ctx.saved_tensors
        gradient = torch.zeros(exponentials.shape, dtype=ctx.logits_dtype, device=exponentials.device)
        rows = grad_loss.nonzero(as_tuple=True)
        weight = grad_loss[rows]
        selected = exponentials[rows].mul_((weight / total[rows])[:, None])
        is_label_here = ~elsewhere[rows]
        selected.scatter_add_(1, here[rows][:, None], (-weight * is_label_here)[:, None])
        gradient[rows] = selected.to(ctx.logits_dtype)
        return gradient, None, None, None


def _rank(group: ProcessGroup | None) -> int:
    return group.rank() if group is not None else 0


def _shifted_logits(logits: Tensor, group: ProcessGroup | None, vocab_size: int | None) -> Tensor:
    """Return an fp32 copy of the logits minus the maximum of their global row; -inf for padding entries."""
    shard = logits.size(-1)
    real = shard if vocab_size is None else min(max(vocab_size - _rank(group) * shard, 0), shard)
    if real:
        highest = logits[..., :real].amax(-1).float()
    else:
        highest = torch.full(logits.shape[:-1], -torch.inf, device=logits.device)
    if group is not None and group.size() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits.float() - highest[..., None]
    if real < shard:
        shifted[..., real:] = -torch.inf
    return shifted


def check_labels(labels: Tensor, vocab_size: int) -> None:
    if labels.device.type != "cpu" or not labels.numel():
        return  # on a GPU the check would wait for the device; the assertion in gather stops the run
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"a label is {low if low < 0 else high}, and the vocabulary has {vocab_size} entries")
