"""Bytes of text of evaluated labels."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.data.batches import MicroBatch
from megatron_slm.tokenizers.byte_lengths import ByteLengths
from megatron_slm.tokenizers.tokenizer import Tokenizer


class LabelBytes:
    """Count the UTF-8 bytes of the text of labels.

    Args:
        tokenizer: tokenizer of the labels.
        device: device of the labels.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        found = tokenizer.byte_lengths()
        self.is_known = found is not None
        lengths = found or ByteLengths([], [])
        self._lengths = torch.tensor(lengths.lengths, dtype=torch.int64, device=device)
        self._added_spaces = torch.tensor(lengths.added_spaces, dtype=torch.int64, device=device)
        self._specials = torch.zeros(len(lengths.lengths), dtype=torch.int64, device=device)
        self._specials[[token for token in tokenizer.special_ids | {tokenizer.eod} if token < len(self._specials)]] = 1

    def count(self, batch: MicroBatch) -> Tensor:
        """Return the bytes of the valid labels of a micro-batch, scalar int64; a special token starts a text."""
        if not self.is_known:
            return batch.labels.new_zeros(())
        lengths = self._lengths[batch.labels] - self._added_spaces[batch.labels] * self._specials[batch.tokens]
        return (lengths * batch.loss_mask).sum()
