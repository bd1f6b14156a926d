"""Multi-token prediction: head d predicts the token d positions after the label of the main head.

    loss  =  Σ selectedᵢ · lossᵢ  +  (λ ÷ D) · Σ_d Σᵢ selectedᵢᵈ · lossᵢᵈ

divided by the selected tokens of the main head (DeepSeek-V3, arXiv 2412.19437, section 2.2). An MTP head either follows
the main head (it is trained on a token if the main head is trained on that token), or it selects independently, by its
losses and the reference scores of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import Selection, select
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch


def mtp_labels(labels: Tensor, tokens: TokenBatch, config: SelectionConfig, heads: int) -> list[Tensor]:
    """Return the labels [b, s] of each MTP head; 0 beyond the sequence's end. Collective over the config's context
    group."""
    sequence = _Sequence(tokens.global_token_index, config.cp_group)
    return [sequence.ahead(labels, distance) for distance in range(1, heads + 1)]


def multi_token_loss(
    heads: Sequence[Tensor], tokens: TokenBatch, selection: Selection, config: SelectionConfig, ratio: float
) -> Tensor:
    """Return the part of the MTP heads in a micro-batch's numerator, a scalar with its graph.

    Collective over the config's context group, and over its group if heads select independently.

    Args:
        heads: [b, s] fp32 token losses of heads 1 to D; those beyond the sample's end do not count.
        tokens: the micro-batch with the losses of the main head.
        selection: selection of the main head.
        config: settings of the selection.
        ratio: the selection ratio.
    """
    total = torch.zeros_like(heads[0][0, 0])
    sequence = _Sequence(tokens.global_token_index, config.cp_group)
    for distance, loss in enumerate(heads, start=1):
        if config.mtp_is_independent:
            weight = select(_tokens_ahead(tokens, loss, distance, sequence), config, ratio).weight
        else:
            weight = sequence.ahead(selection.weight, distance)
        total = total + (loss.masked_fill(weight == 0, 0.0) * weight).sum()
    return config.mtp_loss_weight / len(heads) * total


def _tokens_ahead(tokens: TokenBatch, loss: Tensor, distance: int, sequence: _Sequence) -> TokenBatch:
    """Return the micro-batch of the head at a distance."""
    reference = tokens.reference
    if reference is not None:
        entropy = None if reference.entropy is None else sequence.ahead(reference.entropy, distance)
        reference = ReferenceScores(sequence.ahead(reference.loss, distance), entropy)
    return TokenBatch(
        loss, sequence.ahead(tokens.valid, distance), tokens.global_token_index, tokens.step_token_index, reference
    )


class _Sequence:
    """The sequences of a micro-batch, which context-parallel ranks may share; ``index`` [b, s] orders their tokens."""

    def __init__(self, index: Tensor, context: ProcessGroup | None) -> None:
        self.context = context if context is not None and context.size() > 1 else None
        self.columns = self._whole(index[:1])[0].argsort() if self.context is not None else None

    def ahead(self, values: Tensor, distance: int) -> Tensor:
        """Return the values of the tokens ``distance`` positions ahead, [b, s]; 0 beyond the sequence's end.

        Collective over the context-parallel ranks.
        """
        if self.context is None or self.columns is None:
            return torch.cat((values[:, distance:], torch.zeros_like(values[:, :distance])), 1)
        whole = self._whole(values)
        moved = torch.zeros_like(whole)
        moved[:, self.columns[:-distance]] = whole[:, self.columns[distance:]]
        return moved.chunk(self.context.size(), 1)[self.context.rank()]

    def _whole(self, values: Tensor) -> Tensor:
        """[b, s] of every rank, side by side."""
        assert self.context is not None
        parts = [torch.empty_like(values) for _ in range(self.context.size())]
        dist.all_gather(parts, values.contiguous(), group=self.context)
        return torch.cat(parts, 1)
