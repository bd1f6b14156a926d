"""Rotary embeddings at explicit positions."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding
from torch import Tensor


class RotaryByPosition(torch.nn.Module):
    """Rotary embedding at the position ids of each sample, which may restart with each document.

    Megatron-Core's rotary embedding counts positions from the start of a sample and ignores position ids. Under
    context parallelism, the ids are already those of the local positions.
    """

    position_ids: Tensor | None  # [b, s], set before each forward pass; None counts, as with a key-value cache

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def get_rotary_seq_len(self, *arguments: Any, **options: Any) -> int:
        """Return the sequence length as Megatron-Core counts it."""
        return self.rotary.get_rotary_seq_len(*arguments, **options)

    def forward(self, length: int, **options: Any) -> Tensor:
        """Return the angles [s, b, 1, d] of the position ids, or [length, 1, 1, d] without ids."""
        if self.position_ids is None:
            return self.rotary(length, **options)
        return self.rotary.get_emb(length)[self.position_ids.t(), 0]
