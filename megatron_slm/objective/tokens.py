"""Tokens of a micro-batch as input of the objective: losses, validity, identity and reference scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceScores:
    """Per-token reference loss and entropy for one micro-batch."""

    loss: Tensor  # [b, s] fp32
    entropy: Tensor | None = None  # [b, s] fp32, nats


@dataclass(frozen=True)
class TokenBatch:
    """Represent one micro-batch, or several concatenated by :func:`concat_micro_batches`; all [b, s]."""

    loss: Tensor  # fp32 token losses of the training model, with their graph
    valid: Tensor  # bool, the loss mask
    global_token_index: Tensor  # int64, number of the token in the run: sample index · s + position
    step_token_index: Tensor  # int64, the same counted from the first token of the optimizer step
    reference: ReferenceScores | None = None
    entropy: Tensor | None = None  # [b, s] fp32, nats, of the training model's distributions; if the score needs it
    corpus: Tensor | None = None  # [b] int64, position of each sample's corpus in the blend; None without a blend


def concat_micro_batches(micro_batches: Sequence[TokenBatch]) -> TokenBatch:
    """Concatenate micro-batches of one size along the batch dimension, without their graph."""

    def concat(name: str) -> Any:
        values = [getattr(tokens, name) for tokens in micro_batches]
        return None if values[0] is None else torch.cat([value.detach() for value in values])

    references = [tokens.reference for tokens in micro_batches if tokens.reference is not None]
    entropies = [reference.entropy for reference in references if reference.entropy is not None]
    reference = None
    if references:
        loss = torch.cat([reference.loss for reference in references])
        reference = ReferenceScores(loss, torch.cat(entropies) if entropies else None)
    return TokenBatch(
        loss=concat("loss"),
        valid=concat("valid"),
        global_token_index=concat("global_token_index"),
        step_token_index=concat("step_token_index"),
        reference=reference,
        entropy=concat("entropy"),
        corpus=concat("corpus"),
    )


def diverged_tokens(tokens: TokenBatch) -> Tensor:
    """Return the valid tokens whose token loss or reference loss is NaN or infinite, [b, s] bool.

    Selection accepts such losses and leaves their report to the trainer, which decides for all ranks.
    """
    finite = tokens.loss.detach().isfinite()
    if tokens.reference is not None:
        finite = finite & tokens.reference.loss.isfinite()
    return tokens.valid & ~finite
