"""Multi-token prediction: head d predicts the token that lies d places beyond the label of the main head.

    loss  =  Σ selectedᵢ · lossᵢ  +  (λ ÷ D) · Σ_d Σᵢ selectedᵢᵈ · lossᵢᵈ

divided by the selected tokens of the main head (DeepSeek-V3, arXiv 2412.19437, section 2.2). A head may follow the
main head's choice: it is trained on a token where the main head is trained on that same token. Or it ranks its own
losses, by the reference scores of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.selective_loss import ReferenceScores, Selection, Selector, Tokens, select


def multi_token_loss(
    heads: Sequence[Tensor], tokens: Tokens, selection: Selection, selector: Selector, ratio: float
) -> Tensor:
    """What the further heads add to a micro-batch's numerator, a scalar with its graph. Collective over the
    selector's context group, and over its group where heads select for themselves.

    Args:
        heads: [b, s] fp32 token losses of heads 1 to D; what lies beyond the sample's end does not count.
        tokens: the micro-batch as the main head sees it, and ``selection`` its choice.
    """
    total = torch.zeros_like(heads[0][0, 0])
    for distance, loss in enumerate(heads, start=1):
        if selector.heads_select:
            weight = select(_further(tokens, loss, distance, selector.context), selector, ratio).weight
        else:
            weight = _ahead(selection.weight, distance, tokens, selector.context)
        total = total + (loss.masked_fill(weight == 0, 0.0) * weight).sum()
    return selector.heads_weight / len(heads) * total


def _further(tokens: Tokens, loss: Tensor, distance: int, context: ProcessGroup | None) -> Tokens:
    """The micro-batch as the head at a distance sees it."""
    reference = tokens.reference
    if reference is not None:
        entropy = None if reference.entropy is None else _ahead(reference.entropy, distance, tokens, context)
        reference = ReferenceScores(_ahead(reference.loss, distance, tokens, context), entropy)
    return Tokens(loss, _ahead(tokens.valid, distance, tokens, context), tokens.index, tokens.order, reference)


def _ahead(values: Tensor, distance: int, tokens: Tokens, context: ProcessGroup | None) -> Tensor:
    """What the token that lies ``distance`` places on in the sequence holds, [b, s]; 0 beyond the sequence's end."""
    if context is None or context.size() == 1:
        return torch.cat((values[:, distance:], torch.zeros_like(values[:, :distance])), 1)
    columns = _all_columns(tokens.index[:1], context)[0].argsort()  # in the order of the sequence
    whole = _all_columns(values, context)
    moved = torch.zeros_like(whole)
    moved[:, columns[:-distance]] = whole[:, columns[distance:]]
    return moved.chunk(context.size(), 1)[context.rank()]


def _all_columns(values: Tensor, context: ProcessGroup) -> Tensor:
    """[b, s] of every context-parallel rank, side by side."""
    parts = [torch.empty_like(values) for _ in range(context.size())]
    dist.all_gather(parts, values.contiguous(), group=context)
    return torch.cat(parts, 1)
