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

    position_ids: Tensor  # [b, s], set before each forward pass of the model

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def get_rotary_seq_len(self, *arguments: Any, **options: Any) -> int:
        """Return the sequence length as Megatron-Core counts it."""
        return self.rotary.get_rotary_seq_len(*arguments, **options)

    def forward(self, length: int, **_: Any) -> Tensor:
        """Return the angles [s, b, 1, d]; the length follows from the position ids."""
        frequencies = self.rotary.inv_freq.to(self.position_ids.device)
        angles = self.position_ids.t()[:, :, None, None] * frequencies
        return torch.cat((angles, angles), dim=-1)
