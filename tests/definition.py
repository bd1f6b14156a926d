"""Reference implementation of Selective Language Modeling for tests: float64, one token at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label] of every token in float64; [b, s, V] and [b, s] -> [b, s]."""
    return -logits.double().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of each token's distribution, in float64."""
    probabilities = logits.double().softmax(-1)
    return torch.special.entr(probabilities).sum(-1)


def select(scores: list[float], valid: list[bool], ratio: float, lowest: bool = False) -> list[bool]:
    """Return the mask of the ⌈k · valid⌉ best valid tokens of one ranking; ties go to the first token."""
    positions = [position for position in range(len(scores)) if valid[position]]
    count = math.ceil(Fraction(str(ratio)) * len(positions))
    best = sorted(positions, key=lambda position: (scores[position] if lowest else -scores[position], position))[:count]
    return [position in best for position in range(len(scores))]


def select_scope(scores: Tensor, valid: Tensor, ratio: float, scope: str, lowest: bool = False) -> Tensor:
    """Return the selection mask of a batch [b, s]; scope "sequence" ranks each sequence separately."""
    rows = [scores[i : i + 1] for i in range(len(scores))] if scope == "sequence" else [scores]
    masks = [valid[i : i + 1] for i in range(len(valid))] if scope == "sequence" else [valid]
    chosen = [
        torch.tensor(select(row.flatten().tolist(), mask.flatten().tolist(), ratio, lowest)).view(row.shape)
        for row, mask in zip(rows, masks, strict=True)
    ]
    return torch.cat(chosen)


def softmax_weights(scores: list[float], selected: list[bool], temperature: float, lowest: bool = False) -> list[float]:
    """Return the weights of one ranking: the softmax over its selected tokens times their number."""
    sign = -1 if lowest else 1
    weights = [
        math.exp(sign * score / temperature) * is_selected for score, is_selected in zip(scores, selected, strict=True)
    ]
    return [sum(selected) * weight / max(sum(weights), 1e-300) for weight in weights]
