"""One training step: reference scores, forward and backward of the selected tokens, optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_slm.config.schema import ObjectiveConfig
from megatron_slm.data.batches import MicroBatch
from megatron_slm.model.pipeline import run_pipeline
from megatron_slm.objective.early_rule import EarlyRule
from megatron_slm.objective.linear_cross_entropy.early import EarlySelection
from megatron_slm.objective.selective_loss import ReferenceScores, Selector, Tokens, selective_loss
from megatron_slm.runtime.errors import DivergedError
from megatron_slm.training.checkpoint import Trainable
from megatron_slm.training.metrics import TokenSums


class ReferenceSource(Protocol):
    """Where reference scores come from."""

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[ReferenceScores]: ...


@dataclass(frozen=True)
class Step:
    """What a step did, known on every rank."""

    sums: TokenSums
    grad_norm: float
    lr: float


def selection_ratio(config: ObjectiveConfig, step: int) -> float:
    """The ratio k of a step (counted from 0): linear from its start to its final value, then constant."""
    start, final = config.slm_selection_ratio_start, config.slm_selection_ratio
    if start is None or step >= config.slm_selection_ratio_warmup_iters:
        return final
    return start + (final - start) * step / config.slm_selection_ratio_warmup_iters


def as_tokens(batch: MicroBatch, token_loss: Tensor, reference: ReferenceScores | None) -> Tokens:
    """A micro-batch and the model's losses of it, as the objective wants them."""
    index = batch.token_index()
    return Tokens(
        loss=token_loss,
        valid=batch.loss_mask,
        index=index,
        order=index - batch.first_sample * batch.tokens.size(1),
        reference=reference,
    )


def token_sums(
    chunks: Sequence[object],
    micro_batches: Sequence[MicroBatch],
    selector: Selector,
    *,
    ratio: float = 1.0,
    reference: ReferenceSource | None = None,
    forward_only: bool = False,
    early: EarlyRule | None = None,
) -> list[TokenSums]:
    """Run all micro-batches through the model and the objective; one entry per micro-batch on the last stage."""
    scores = reference.score(micro_batches) if reference is not None else []

    def loss_of(number: int, batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, TokenSums]:
        tokens = as_tokens(batch, output, scores[number] if scores else None)
        loss = selective_loss(tokens, selector, ratio)
        if early is not None:
            early.after(loss)
        return loss.numerator, loss.count, TokenSums.of(tokens, loss)

    def early_of(number: int, batch: MicroBatch) -> EarlySelection | None:
        return early.before(batch.loss_mask, scores[number] if scores else None, ratio) if early is not None else None

    return run_pipeline(
        chunks,  # type: ignore[arg-type]
        micro_batches,
        loss_of,
        forward_only=forward_only,
        early_of=early_of,
    )


def train_step(
    trainable: Trainable,
    micro_batches: Sequence[MicroBatch],
    selector: Selector,
    *,
    ratio: float,
    reference: ReferenceSource | None,
    early: EarlyRule | None = None,
) -> Step:
    """One optimizer step on a global batch. Collective over all ranks.

    Raises:
        DivergedError: a loss or the gradient norm is NaN or infinite.
    """
    optimizer = trainable.optimizer
    for chunk in trainable.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.zero_grad()
    parts = token_sums(trainable.chunks, micro_batches, selector, ratio=ratio, reference=reference, early=early)
    lr = max(group["lr"] for group in optimizer.param_groups)
    _, grad_norm, _ = optimizer.step()
    norm = float(grad_norm) if grad_norm is not None else math.nan
    if grad_norm is not None and not math.isfinite(norm):
        raise DivergedError(f"the gradient norm is {norm}. A lower --lr or a longer warm-up may help.")
    batch = micro_batches[0].tokens.size(0) * len(micro_batches) * trainable.groups.dp_size
    trainable.scheduler.step(increment=batch)
    return Step(TokenSums.reduce(parts, trainable.groups), norm, lr)
