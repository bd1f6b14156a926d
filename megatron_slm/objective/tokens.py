"""Tokens of a micro-batch as input of the objective: losses, validity, identity and reference scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.runtime.collective import all_reduce_sum
from megatron_slm.runtime.errors import DivergedError


@dataclass(frozen=True)
class ReferenceScores:
    """Per-token reference loss and entropy for one micro-batch."""

    loss: Tensor  # [b, s] fp32
    entropy: Tensor | None = None  # [b, s] fp32, nats


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch, or several concatenated by :func:`concat_micro_batches`; all [b, s]."""

    loss: Tensor  # fp32 token losses of the training model, with their graph
    valid: Tensor  # bool, the loss mask
    global_token_index: Tensor  # int64, number of the token in the run: sample index · s + position
    step_token_index: Tensor  # int64, the same counted from the first token of the optimizer step
    reference: ReferenceScores | None = None


def concat_micro_batches(micro_batches: Sequence[TokenBatch]) -> TokenBatch:
    """Concatenate micro-batches of one size along the batch dimension, without their graph."""

    def concat(name: str) -> Tensor:
        return torch.cat([getattr(tokens, name).detach() for tokens in micro_batches])

    references = [tokens.reference for tokens in micro_batches if tokens.reference is not None]
    entropies = [reference.entropy for reference in references if reference.entropy is not None]
    reference = None
    if references:
        loss = torch.cat([reference.loss for reference in references])
        reference = ReferenceScores(loss, torch.cat(entropies) if entropies else None)
    return TokenBatch(
        concat("loss"), concat("valid"), concat("global_token_index"), concat("step_token_index"), reference
    )


def all_reduce_counts(tokens: TokenBatch, counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return ``counts`` [c] int64 summed over the group; the same message carries the number of diverged losses.

    Raises:
        DivergedError: a loss of a valid token is NaN or infinite, on any rank.
    """
    diverged = tokens.valid & ~tokens.loss.detach().isfinite()
    if tokens.reference is not None:
        diverged |= tokens.valid & ~tokens.reference.loss.isfinite()
    summed = all_reduce_sum(torch.cat((counts, diverged.sum()[None])), group)
    if summed[-1]:
        raise DivergedError(_describe_divergence(tokens, diverged, int(summed[-1])))
    return summed[:-1]


def _describe_divergence(tokens: TokenBatch, diverged: Tensor, total: int) -> str:
    places = diverged.nonzero()
    if not len(places):
        return f"{total} losses on other ranks are NaN or infinite."
    row, position = (int(number) for number in places[0])
    loss = float(tokens.loss[row, position])
    values = f"token loss {loss}"
    if tokens.reference is not None:
        values += f", reference loss {float(tokens.reference.loss[row, position])}"
    return f"{total} losses are NaN or infinite; the first here is row {row}, position {position}: {values}."
