"""Training step: reference scores, forward and backward for the selected tokens, optimizer update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_slm.data.batches import MicroBatch
from megatron_slm.model.hidden_states import HiddenStates
from megatron_slm.model.pipeline import run_pipeline
from megatron_slm.model.selected_tokens import BackwardFilter
from megatron_slm.objective.linear_cross_entropy.settings import TokenLosses
from megatron_slm.objective.multi_token import mtp_labels, multi_token_loss
from megatron_slm.objective.selection.strategies import SelectionStrategy
from megatron_slm.objective.selective_loss import selective_loss
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch, concat_micro_batches
from megatron_slm.runtime.process import preserved_random_state
from megatron_slm.training.metrics import TokenSums
from megatron_slm.training.state import TrainState

# Returns one entry per micro-batch on the last pipeline stage. Collective over all ranks.
ReferenceSource = Callable[[Sequence[MicroBatch]], Sequence[ReferenceScores | None]]


def no_reference(micro_batches: Sequence[MicroBatch]) -> list[None]:
    """Implement the reference source for scores that do not need a reference model."""
    return [None] * len(micro_batches)


@dataclass(frozen=True)
class Step:
    """Represent the result of a step on every rank."""

    sums: TokenSums
    grad_norm: float
    lr: float
    ratio: float  # selection ratio
    seconds_ranking: float | None  # time of the ranking pass, if any
    loss_scale: float | None = None  # dynamic loss scale, if any
    overflow: bool = False  # gradients overflowed fp16: no update, and the schedule does not advance


@dataclass(frozen=True)
class MicroBatchResult:
    """Hold the token losses of a micro-batch and their sums, without graph."""

    sums: TokenSums
    tokens: TokenBatch
    selected: Tensor  # [b, s] bool


@dataclass(frozen=True)
class StepResults:
    """Hold the results of a step between its backward pass and its update."""

    sums: TokenSums  # over the global batch, on every rank
    micro_batches: Sequence[MicroBatch]  # of this data-parallel rank
    results: Sequence[MicroBatchResult]  # one per micro-batch on the last pipeline stage, none elsewhere
    overflow: bool = False  # gradients overflowed fp16, and the loss scale was reduced


# Decides whether the weights are updated, from the results and the gradient norm of a step (NaN or infinite also if
# losses are, or an overflow); equally on every rank. Collective over all ranks.
StepObserver = Callable[[StepResults, float], bool]


def token_batch(
    batch: MicroBatch, losses: TokenLosses, reference: ReferenceScores | None, step_first_sample: int
) -> TokenBatch:
    """Return the tokens of a micro-batch with their losses; its step starts at ``step_first_sample``."""
    index = batch.token_index()
    return TokenBatch(
        loss=losses.loss,
        entropy=losses.entropy,
        corpus=batch.corpus,
        valid=batch.loss_mask,
        global_token_index=index,
        step_token_index=index - step_first_sample * batch.sample_length,
        reference=reference,
    )


@dataclass(frozen=True)
class StepPasses:
    """Run the micro-batches of a step through the model and the objective. Collective over all ranks."""

    model_chunks: Sequence[torch.nn.Module]
    micro_batches: Sequence[MicroBatch]
    references: Sequence[ReferenceScores | None]
    backward_filter: BackwardFilter | None = None  # None for the exact backward pass
    with_entropy: bool = False  # whether the selection needs the entropies of the training model

    def ranking_pass(self) -> list[TokenBatch]:
        """Run the ranking pass (forward without gradients); return one entry per micro-batch on the last stage.

        Random states are restored, so that the following pass has the same dropout and losses.
        """

        def last_stage(index: int, batch: MicroBatch, hidden: HiddenStates) -> tuple[Tensor, Tensor, TokenBatch]:
            tokens = self._tokens(index, batch, hidden.token_losses(batch.labels, with_entropy=self.with_entropy))
            return tokens.loss.sum(), batch.loss_mask.sum(), concat_micro_batches([tokens])

        with preserved_random_state(), torch.no_grad():
            return run_pipeline(self.model_chunks, self.micro_batches, last_stage, forward_only=True)

    def run(self, selection: SelectionStrategy) -> list[MicroBatchResult]:
        """Run forward and, if gradients are enabled, backward; return one entry per micro-batch on the last stage."""

        forward_only = not torch.is_grad_enabled()
        backward_filter = None if forward_only else self.backward_filter

        def last_stage(index: int, batch: MicroBatch, hidden: HiddenStates) -> tuple[Tensor, Tensor, MicroBatchResult]:
            forward_grad = None
            if torch.is_grad_enabled():
                forward_grad = selection.forward_grad_policy(
                    index, batch.loss_mask, batch.token_index(), self.references[index], batch.loss_mask_on_host
                )
            labels = [batch.labels]
            if torch.is_grad_enabled():
                labels += mtp_labels(batch.labels, batch.token_index(), selection.config, len(hidden.heads) - 1)
            losses, *heads = hidden.head_losses(labels, forward_grad=forward_grad, with_entropy=self.with_entropy)
            tokens = self._tokens(index, batch, losses)
            selected = selection.select(index, tokens)
            loss = selective_loss(tokens, selected)
            if backward_filter is not None:
                backward_filter.select(index, loss.selected)
            numerator = loss.numerator
            if heads:
                numerator = numerator + multi_token_loss(heads, tokens, selected, selection.config, selection.ratio)
            without_graph = replace(tokens, loss=tokens.loss.detach())
            result = MicroBatchResult(TokenSums.from_micro_batch(tokens, loss), without_graph, loss.selected)
            return numerator, loss.count, result

        return run_pipeline(
            self.model_chunks,
            self.micro_batches,
            last_stage,
            forward_only=forward_only,
            backward_filter=backward_filter,
        )

    def _tokens(self, index: int, batch: MicroBatch, losses: TokenLosses) -> TokenBatch:
        return token_batch(batch, losses, self.references[index], self.micro_batches[0].first_sample)


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    *,
    ratio: float,
    next_ratio: float,
    reference: ReferenceSource,
    observer: StepObserver,
) -> Step:
    """Run one optimizer step on a global batch, without advancing the schedule. Collective over all ranks.

    Args:
        ratio: selection ratio of this step.
        next_ratio: selection ratio of the next step.
        observer: decides on the update.

    Raises:
        DivergedError: the observer ends the run, equally on every rank.
    """
    state.zero_grad()
    passes = StepPasses(
        *(state.model_chunks, micro_batches, reference(micro_batches), state.backward_filter),
        with_entropy=state.selection.config.with_entropy,
    )
    start = time.perf_counter()
    ranked = state.selection.begin_step(ratio, next_ratio, passes.ranking_pass)
    seconds_ranking = time.perf_counter() - start if ranked else None
    state.auxiliary.scale(state.selection.selected_share)
    results = passes.run(state.selection)
    state.selection.end_step()
    sums = TokenSums.reduce([result.sums for result in results], state.groups)
    config = state.selection.config
    if (state.auxiliary.active or config.mix or config.mtp_is_independent) and not sums.selected:
        state.zero_grad()  # without selected tokens, gradients of other losses and weights cannot be normalized
    lr, loss_scale, gradients = state.lr, state.dynamic_loss_scale(), state.prepare_gradients()
    if observer(StepResults(sums, micro_batches, results, gradients.overflow), gradients.norm):
        state.optimizer_step(gradients.norm)
    return Step(sums, gradients.norm, lr, state.selection.ratio, seconds_ranking, loss_scale, gradients.overflow)
