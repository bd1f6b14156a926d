"""Linear cross-entropy: token losses of an LM head without all logits in memory.

    zᵢ    = hᵢ Wᵀ, capped to c · tanh(zᵢ / c) with a soft-cap c
    lseᵢ  = log Σᵥ exp zᵢᵥ, over the true vocabulary and all its shards
    lossᵢ = lseᵢ − zᵢ[labelᵢ]

The backward pass computes gradients only for tokens with a nonzero incoming gradient, the selected ones. With
a z-loss coefficient ζ (PaLM, arXiv 2204.02311, section 5) the gradient is that of lossᵢ + ζ · lseᵢ², weighted as the
token is; the value that is returned, ranked and logged stays the pure lossᵢ.

Three implementations compute the same result: ``torch``, the definition, with all logits in memory; ``chunked``, with
chunks of logits in torch operations on any device; ``triton``, with chunks and fused kernels between the matrix
products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.objective.cross_entropy import check_labels, mark_outside_labels
from megatron_slm.objective.linear_cross_entropy.chunked import chunked_token_loss
from megatron_slm.objective.linear_cross_entropy.definition import full_token_loss
from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy
from megatron_slm.objective.linear_cross_entropy.settings import IMPLEMENTATIONS, LinearCrossEntropyConfig, TokenLosses
from megatron_slm.objective.vocab_shard import VocabShard


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: LinearCrossEntropyConfig,
    *,
    forward_grad: ForwardGradPolicy | None = None,
    with_entropy: bool = False,
) -> TokenLosses:
    """Return the token losses of ``labels`` under the LM head.

    FLOPs for N tokens of which a share k is selected: 2NHV forward and 6kNHV backward, as logits of selected rows are
    computed again; 4kNHV backward for tokens that ``forward_grad`` names rightly, or if the logits were saved.
    Collectives over the tensor-parallel group: two of a few bytes per token forward (two per chunk of rows with
    ``forward_grad``), and those of Megatron-Core's column-parallel layer for the hidden states.

    If the weight has a ``main_grad`` (from Megatron-Core's DDP), its gradient is added there, and autograd receives
    a placeholder, as in Megatron-Core's fused accumulation.

    Args:
        hidden: [s, b, h] fp32 or bf16, or [s / tp, b, h] with sequence parallelism; any leading shape without.
        weight: [V / tp, h] in the same dtype, this rank's shard of the LM head or tied embedding.
        labels: [s, b] int64, ids in the full vocabulary.
        forward_grad: tokens whose gradient is computed while their logits are available, an estimate of the selection.
            It affects only the time, not the result. The implementation ``torch`` ignores it, as well as saved logits.
        with_entropy: also give entropies.

    Raises:
        ValueError: a label on the host is outside the vocabulary (on a GPU, its loss is NaN), or the implementation is
            unknown.
    """
    if config.implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"the cross-entropy implementation {config.implementation!r} is unknown; there are {known}")
    shard = VocabShard.from_size(weight.size(0), config.tp_group, config.vocab_size)
    check_labels(labels, shard.vocab_size)
    if config.implementation == "torch":
        return TokenLosses(*full_token_loss(hidden, weight, labels, config, shard, with_entropy))
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    losses = chunked_token_loss(
        hidden, weight, labels, config, shard, forward_grad if needs_gradient else None, with_entropy, needs_gradient
    )
    return losses._replace(loss=mark_outside_labels(losses.loss, labels, shard.vocab_size))
