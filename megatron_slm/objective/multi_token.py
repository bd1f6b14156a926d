"""Multi-token prediction: head d predicts the token d positions after the label of the main head.

    loss  =  Σ selectedᵢ · lossᵢ  +  (λ ÷ D) · Σ_d Σᵢ selectedᵢᵈ · lossᵢᵈ

divided by the selected tokens of the main head (DeepSeek-V3, arXiv 2412.19437, section 2.2). An MTP head either follows
the main head (it is trained on a token if the main head is trained on that token), or it selects independently, by its
losses and the reference scores of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.linear_cross_entropy.settings import TokenLosses
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import Selection, select
from megatron_slm.objective.selective_loss import weighted_sum
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch
from megatron_slm.runtime.collective import group_rank, group_size


def mtp_labels(labels: Tensor, global_token_index: Tensor, config: SelectionConfig, head_count: int) -> list[Tensor]:
    """Return the labels [b, s] of each MTP head; 0 beyond the sequence's end. Collective over ``config.cp_group``."""
    if not head_count:
        return []
    sequence = _Sequence(global_token_index, config.cp_group)
    return [sequence.shift_left(labels, distance) for distance in range(1, head_count + 1)]


def multi_token_loss(
    heads: Sequence[TokenLosses], tokens: TokenBatch, selection: Selection, config: SelectionConfig, ratio: float
) -> Tensor:
    """Return the part of the MTP heads in a micro-batch's numerator, a scalar with its graph.

    Collective over the config's context group, and over its group if heads select independently.

    Args:
        heads: [b, s] fp32 token losses of heads 1 to D; those beyond the sample's end do not count. Their entropies are
            only needed if the heads select independently by them.
        tokens: the micro-batch with the losses of the main head.
        selection: selection of the main head.
        config: settings of the selection.
        ratio: the selection ratio.
    """
    total = torch.zeros_like(heads[0].loss[0, 0])
    sequence = _Sequence(tokens.global_token_index, config.cp_group)
    for distance, head in enumerate(heads, start=1):
        if config.mtp_is_independent:
            weight = select(_shifted_tokens(tokens, head, distance, sequence), config, ratio).weight
        else:
            weight = sequence.shift_left(selection.weight, distance)
        total = total + weighted_sum(head.loss, weight)
    return config.mtp_loss_weight / len(heads) * total


def _shifted_tokens(tokens: TokenBatch, head: TokenLosses, distance: int, sequence: _Sequence) -> TokenBatch:
    """Return the micro-batch of the head at a distance."""
    reference = tokens.reference
    if reference is not None:
        entropy = None if reference.entropy is None else sequence.shift_left(reference.entropy, distance)
        reference = ReferenceScores(sequence.shift_left(reference.loss, distance), entropy)
    valid = sequence.shift_left(tokens.valid, distance)
    return replace(tokens, loss=head.loss, entropy=head.entropy, valid=valid, reference=reference)


class _Sequence:
    """Represent the sequences of a micro-batch, which context-parallel ranks may share, ordered by ``index`` [b, s]."""

    def __init__(self, index: Tensor, cp_group: ProcessGroup | None) -> None:
        self.cp_group = cp_group
        self.columns = self._gather(index[:1])[0].argsort() if group_size(cp_group) > 1 else None

    def shift_left(self, values: Tensor, distance: int) -> Tensor:
        """Return the values of the tokens ``distance`` positions ahead, [b, s]; 0 beyond the sequence's end.

        Collective over the context-parallel ranks.
        """
        if self.columns is None:
            return torch.cat((values[:, distance:], torch.zeros_like(values[:, :distance])), 1)
        gathered = self._gather(values)
        shifted = torch.zeros_like(gathered)
        shifted[:, self.columns[:-distance]] = gathered[:, self.columns[distance:]]
        return shifted.chunk(group_size(self.cp_group), 1)[group_rank(self.cp_group)]

    def _gather(self, values: Tensor) -> Tensor:
        """Return the columns [b, s] of every context-parallel rank, side by side."""
        parts = [torch.empty_like(values) for _ in range(group_size(self.cp_group))]
        dist.all_gather(parts, values.contiguous(), group=self.cp_group)
        return torch.cat(parts, 1)
