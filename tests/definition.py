"""Selective Language Modeling written down plainly in float64, one token after another: what all tests hold to."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of every token; [b, s, V] and [b, s], float64."""
    return -logits.double().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def entropies(logits: Tensor) -> Tensor:
    probabilities = logits.double().softmax(-1)
    return torch.special.entr(probabilities).sum(-1)


def select(scores: list[float], valid: list[bool], ratio: float, lowest: bool = False) -> list[bool]:
    """The ⌈k · valid⌉ best valid tokens of one ranking; the first of those that are equal."""
    places = [place for place in range(len(scores)) if valid[place]]
    count = math.ceil(Fraction(str(ratio)) * len(places))
    best = sorted(places, key=lambda place: (scores[place] if lowest else -scores[place], place))[:count]
    return [place in best for place in range(len(scores))]


def select_scope(scores: Tensor, valid: Tensor, ratio: float, scope: str, lowest: bool = False) -> Tensor:
    """The selection of a whole batch [b, s]; each sequence by itself under scope "sequence"."""
    rows = [scores[i : i + 1] for i in range(len(scores))] if scope == "sequence" else [scores]
    masks = [valid[i : i + 1] for i in range(len(valid))] if scope == "sequence" else [valid]
    chosen = [
        torch.tensor(select(row.flatten().tolist(), mask.flatten().tolist(), ratio, lowest)).view(row.shape)
        for row, mask in zip(rows, masks, strict=True)
    ]
    return torch.cat(chosen)
