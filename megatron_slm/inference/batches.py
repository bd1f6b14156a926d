"""Batches of token sequences of different lengths, padded for one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.mcore.layers import context_positions
from megatron_slm.runtime.groups import Groups


@dataclass(frozen=True)
class ScoringRequest:
    """Represent a token sequence whose tokens from ``first`` on are scored; the tokens before are context."""

    tokens: Sequence[int]
    first: int = 1  # at least 1: the model gives no probability for the first token

    @property
    def scored(self) -> int:
        """Return the number of scored tokens."""
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class ScoringBatch:
    """Hold this context-parallel rank's part of sequences padded on the right, where causal attention needs no mask."""

    tokens: Tensor  # [b, s / cp] int64
    labels: Tensor  # [b, s / cp] int64, the next tokens
    scored: Tensor  # [b, s / cp] bool, True for labels to score
    places: Tensor  # [b, s / cp] int64, numbers of the labels to score
    position_ids: Tensor  # [b, s / cp] int64
    count: int  # labels to score on all context-parallel ranks
    sample_length: int  # s
    attention_mask: None = None

    @classmethod
    def build(
        cls, requests: Sequence[ScoringRequest], rows: int, length: int, pad: int, groups: Groups
    ) -> ScoringBatch:
        """Pad requests to [rows, length] with the token ``pad``; rows without a request score nothing."""
        ids = torch.full((rows, length + 1), pad, dtype=torch.int64)
        scored = torch.zeros(rows, length, dtype=torch.bool)
        for row, request in enumerate(requests):
            ids[row, : len(request.tokens)] = torch.tensor(list(request.tokens), dtype=torch.int64)
            scored[row, request.first - 1 : len(request.tokens) - 1] = True
        places, count = scored.flatten().cumsum(0).view_as(scored) - 1, int(scored.sum())
        last = max([0, *(len(request.tokens) - 2 for request in requests)])
        positions = torch.arange(length).clamp(max=last).expand(rows, length)  # the model may have no others
        size = groups.cp.size()
        columns = context_positions(length, size, groups.cp.rank()) if size > 1 else slice(None)
        tokens, labels, scored, places, positions = (
            values[:, columns].to(groups.device) for values in (ids[:, :-1], ids[:, 1:], scored, places, positions)
        )
        return cls(tokens, labels, scored, places, positions, count, length)


@dataclass(frozen=True)
class PromptBatch:
    """Hold the new tokens of sequences padded on the left, so that all continue at the same column.

    Rotary embeddings depend on distances only, so that the padding does not affect them; learned position embeddings
    use ``position_ids``.
    """

    tokens: Tensor  # [b, s] int64, columns ``start`` to ``start + s`` of the sequences
    position_ids: Tensor  # [b, s] int64
    attention_mask: Tensor | None  # [b, 1, s, start + s] bool, True for masked pairs; None without padding

    @property
    def sample_length(self) -> int:
        return self.tokens.size(1)

    @classmethod
    def build(cls, tokens: Tensor, padding: Tensor, start: int, last_position: int) -> PromptBatch:
        """Return the batch of the columns from ``start`` on.

        Args:
            tokens: [b, t] int64, padded sequences.
            padding: [b] int64, padding tokens of each sequence.
            start: number of columns whose keys and values are cached.
            last_position: limit of position ids, for sequences that have ended.
        """
        columns = torch.arange(tokens.size(1), device=tokens.device)
        queries = columns[start:]
        positions = (queries - padding[:, None]).clamp(0, last_position)
        mask = None
        if bool(padding.any()):
            padded_keys = columns < padding[:, None, None]
            queries_text = queries[:, None] >= padding[:, None, None]  # padding attends to padding: no row is empty
            mask = ((columns > queries[:, None]) | (padded_keys & queries_text))[:, None]
        return cls(tokens[:, start:], positions, mask)
