"""One training step: reference scores, forward and backward of the selected tokens, optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.config.schema import ObjectiveConfig
from megatron_slm.data.batches import MicroBatch
from megatron_slm.model.pipeline import run_pipeline
from megatron_slm.objective.carried import CarriedThreshold
from megatron_slm.objective.early_rule import EarlyRule
from megatron_slm.objective.linear_cross_entropy.early import EarlySelection
from megatron_slm.objective.multi_token import multi_token_loss
from megatron_slm.objective.policy import Term
from megatron_slm.objective.selective_loss import (
    Carried,
    ReferenceScores,
    Selection,
    Selector,
    Tokens,
    as_one,
    carried_lowest,
    select,
    select_carried,
    selective_loss,
)
from megatron_slm.runtime.errors import DivergedError
from megatron_slm.runtime.groups import Groups
from megatron_slm.runtime.process import preserved_random_state
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
    seconds_ranking: float | None  # of the forward pass that only ranks (scope "global-batch"), where there was one


def selection_ratio(config: ObjectiveConfig, step: int) -> float:
    """The ratio k of a step (counted from 0): linear from its start to its final value, then constant."""
    start, final = config.slm_selection_ratio_start, config.slm_selection_ratio
    if start is None or step >= config.slm_selection_ratio_warmup_iters:
        return final
    return start + (final - start) * step / config.slm_selection_ratio_warmup_iters


def as_tokens(batch: MicroBatch, token_loss: Tensor, reference: ReferenceScores | None, first_sample: int) -> Tokens:
    """A micro-batch and the model's losses of it, as the objective wants them; ``first_sample`` is the step's."""
    index = batch.token_index()
    return Tokens(
        loss=token_loss,
        valid=batch.loss_mask,
        index=index,
        order=index - first_sample * batch.sample_length,
        reference=reference,
    )


def _heads(output: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The token losses of the main head, and those of the further heads of multi-token prediction; all [b, s]."""
    return (output, ()) if output.dim() == 2 else (output[0], output[1:].unbind())


@dataclass
class StepSelection:
    """How the tokens of one step are selected: by what is known before the first backward pass, where the scope is
    the global batch, and else each micro-batch by itself."""

    selector: Selector
    ratio: float = 1.0
    ranked: Sequence[Selection] = ()  # of every micro-batch: exact, over the global batch
    carried: Carried | None = None
    early: EarlyRule | None = None  # tells which tokens may get their gradient at once
    remembers: bool = False  # whether ``seen`` is filled
    seen: list[tuple[Tokens, Tensor]] = field(default_factory=list)  # tokens, and which of them were selected

    def of(self, number: int, tokens: Tokens) -> Selection:
        """The selection of micro-batch ``number``. Collective over the selector's group unless it is known."""
        if self.ranked:
            selection = self.ranked[number]
        elif self.carried is not None:
            selection = select_carried(tokens, self.selector, self.carried)
        else:
            selection = select(tokens, self.selector, self.ratio)
            if self.early is not None:
                self.early.after(selection)
        if self.remembers:
            self.seen.append((as_one([tokens]), selection.selected))
        return selection

    def early_of(self, number: int, batch: MicroBatch, reference: ReferenceScores | None) -> EarlySelection | None:
        """The tokens of micro-batch ``number`` whose gradient may be computed at once, on the last stage."""
        if self.early is None:
            return None
        lowest = None
        if self.carried is not None:
            lowest = carried_lowest(batch.token_index(), self.selector, self.carried)[0]
        ranked = self.ranked[number] if self.ranked else None
        return self.early.before(batch.loss_mask, reference, self.ratio, selection=ranked, lowest=lowest)


def token_sums(
    chunks: Sequence[object],
    micro_batches: Sequence[MicroBatch],
    selection: StepSelection,
    *,
    scores: Sequence[ReferenceScores] = (),
    forward_only: bool = False,
) -> list[TokenSums]:
    """Run all micro-batches through the model and the objective; one entry per micro-batch on the last stage."""

    def loss_of(number: int, batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, TokenSums]:
        main, further = _heads(output)
        tokens = as_tokens(batch, main, scores[number] if scores else None, micro_batches[0].first_sample)
        chosen = selection.of(number, tokens)
        loss = selective_loss(tokens, chosen)
        numerator = loss.numerator
        if further and not forward_only:
            numerator = numerator + multi_token_loss(further, tokens, chosen, selection.selector, selection.ratio)
        return numerator, loss.count, TokenSums.of(tokens, loss)

    def early_of(number: int, batch: MicroBatch) -> EarlySelection | None:
        return selection.early_of(number, batch, scores[number] if scores else None)

    return run_pipeline(
        chunks,  # type: ignore[arg-type]
        micro_batches,
        loss_of,
        forward_only=forward_only,
        early_of=None if forward_only else early_of,
    )


def rank_global_batch(
    chunks: Sequence[object],
    micro_batches: Sequence[MicroBatch],
    selector: Selector,
    *,
    ratio: float,
    scores: Sequence[ReferenceScores],
) -> list[Selection]:
    """The exact selection over all micro-batches of the step and all ranks, from a forward pass of its own.

    Random states are put back, so that the forward pass that follows draws the same dropout and has the same losses.

    Returns:
        one entry per micro-batch on the last stage; nothing elsewhere.
    """

    def tokens_of(number: int, batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Tokens]:
        main, _ = _heads(output)
        tokens = as_tokens(batch, main, scores[number] if scores else None, micro_batches[0].first_sample)
        return output.sum(), batch.loss_mask.sum(), as_one([tokens])

    with preserved_random_state(), torch.no_grad():
        seen = run_pipeline(chunks, micro_batches, tokens_of, forward_only=True)  # type: ignore[arg-type]
    return select(as_one(seen), selector, ratio).split(len(seen)) if seen else []


def train_step(
    trainable: Trainable,
    micro_batches: Sequence[MicroBatch],
    selector: Selector,
    *,
    ratio: float,
    next_ratio: float,
    reference: ReferenceSource | None,
) -> Step:
    """One optimizer step on a global batch. Collective over all ranks.

    Args:
        ratio: the selection ratio of this step, and ``next_ratio`` that of the next.

    Raises:
        DivergedError: a loss or the gradient norm is NaN or infinite.
    """
    optimizer, chunks = trainable.optimizer, trainable.chunks
    for chunk in chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.zero_grad()
    scores = reference.score(micro_batches) if reference is not None else []
    selection = StepSelection(selector, ratio, early=trainable.early, remembers=trainable.carried is not None)
    seconds_ranking = None
    if trainable.carried is not None:
        selection.carried = trainable.carried.carried(ratio)
    if selector.scope == "global-batch" and selector.policy is not None and selection.carried is None:
        began = time.perf_counter()
        selection.ranked = rank_global_batch(chunks, micro_batches, selector, ratio=ratio, scores=scores)
        seconds_ranking = time.perf_counter() - began
    if trainable.auxiliary is not None:
        trainable.auxiliary.scale(_share_to_select(selection, micro_batches, trainable))
    parts = token_sums(chunks, micro_batches, selection, scores=scores)
    if trainable.carried is not None:
        _carry_on(trainable.carried, selection, next_ratio, trainable.groups)
    sums = TokenSums.reduce(parts, trainable.groups)
    if trainable.auxiliary is not None and not sums.selected:
        for chunk in chunks:  # nothing to divide by: what the auxiliary losses left is a sum over tokens
            chunk.zero_grad_buffer()  # type: ignore[operator]
    lr = max(group["lr"] for group in optimizer.param_groups)
    _, grad_norm, _ = optimizer.step()
    norm = float(grad_norm) if grad_norm is not None else math.nan
    if grad_norm is not None and not math.isfinite(norm):
        raise DivergedError(f"the gradient norm is {norm}. A lower --lr or a longer warm-up may help.")
    batch = micro_batches[0].tokens.size(0) * len(micro_batches) * trainable.groups.dp_size
    trainable.scheduler.step(increment=batch)
    return Step(sums, norm, lr, seconds_ranking)


def _share_to_select(selection: StepSelection, micro_batches: Sequence[MicroBatch], trainable: Trainable) -> float:
    """The share of the valid tokens that this step will select, on every rank: exact where the whole step has been
    ranked; else the ratio of the one term, but for the rounding up of counts and what a carried threshold misses;
    else, with a carried threshold, that of the step before."""
    policy, groups = selection.selector.policy, trainable.groups
    if policy is None:
        return 1.0
    if selection.selector.scope == "global-batch" and selection.carried is None:
        counts = torch.zeros(2, dtype=torch.int64, device=groups.device)
        for batch, ranked in zip(micro_batches, selection.ranked, strict=False):  # there are none before the last stage
            counts += torch.stack((ranked.selected.sum(), batch.loss_mask.sum()))
        dist.all_reduce(counts, group=groups.dp_cp)
        dist.broadcast(counts, groups.last_stage_rank, group=groups.pp)
        return float(counts[0]) / max(float(counts[1]), 1.0)
    if isinstance(policy, Term):
        return policy.ratio or selection.ratio
    assert trainable.carried is not None, "checked by build_selector"
    return trainable.carried.share


def _carry_on(carried: CarriedThreshold, selection: StepSelection, next_ratio: float, groups: Groups) -> None:
    """Let the threshold learn from the step on the last stage, and tell the others, of which one saves it."""
    if groups.is_last_stage:
        tokens = as_one([tokens for tokens, _ in selection.seen])
        selected = torch.cat([selected for _, selected in selection.seen])
        carried.observe(tokens, selected, selection.ratio, next_ratio)
    carried.spread(groups.last_stage_rank, groups.pp)
