"""Rotary embeddings at given positions."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding
from torch import Tensor


class RotaryByPosition(torch.nn.Module):
    """Rotary embedding at the position ids of each sample, such as those that restart with each document.

    Megatron-Core's rotary embedding counts positions from the start of a sample and ignores position ids. Under
    context parallelism the ids are those of this rank's positions already.
    """

    position_ids: Tensor  # [b, s], set before each forward pass of the model

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def get_rotary_seq_len(self, *arguments: Any, **more: Any) -> int:
        """Return the sequence length as Megatron-Core counts it."""
        return self.rotary.get_rotary_seq_len(*arguments, **more)

    def forward(self, length: int, **_: Any) -> Tensor:
        """Return the angles [s, b, 1, d]; the length follows from the position ids."""
        frequencies = self.rotary.inv_freq.to(self.position_ids.device)
        angles = self.position_ids.t()[:, :, None, None] * frequencies
        return torch.cat((angles, angles), dim=-1)
