"""Run micro-batches through a model with Megatron-Core's pipeline schedules, forward only or with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_slm.model.hidden_states import HiddenStates
from megatron_slm.model.packed_documents import row_shape
from megatron_slm.model.selected_tokens import BackwardFilter
from megatron_slm.runtime.health.progress import progress
from megatron_slm.runtime.health.work_time import forward_time


class ModelInput(Protocol):
    """Define the fields of a micro-batch that the model reads."""

    @property
    def tokens(self) -> Tensor: ...  # [b, s] int64

    @property
    def position_ids(self) -> Tensor: ...  # [b, s] int64

    @property
    def attention_mask(self) -> Tensor | None: ...  # [b, 1, s, s] bool, True masks a key; or [b, n] document lengths

    @property
    def sample_length(self) -> int: ...  # tokens per sample over all context-parallel ranks


Batch = TypeVar("Batch", bound=ModelInput)
Report = TypeVar("Report")
LastStage = Callable[[int, Batch, HiddenStates], tuple[Tensor, Tensor, Report]]


def run_pipeline(
    model_chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[Batch],
    last_stage: LastStage[Batch, Report],
    *,
    forward_only: bool,
    inference_context: BaseInferenceContext | None = None,
    backward_filter: BackwardFilter | None = None,
) -> list[Report]:
    """Run all micro-batches of a step with the 1F1B schedule, or interleaved if there are several model chunks.

    Args:
        model_chunks: model chunks of this rank.
        micro_batches: micro-batches of this data-parallel rank, identical on its tensor and pipeline ranks.
        last_stage: called on the last stage with the micro-batch index, the micro-batch and its final hidden states;
            returns the sum to differentiate, its token count, and a report. Megatron-Core divides by the sum of
            these counts over the global batch.
        forward_only: omit the backward pass.
        inference_context: key-value cache of the only micro-batch, whose tokens follow the cached ones. Copies of the
            micro-batch write the same values.
        backward_filter: receives the selection of each micro-batch from ``last_stage``; None for the exact backward
            pass.

    Returns:
        the reports of all micro-batches on the last stage, an empty list on other stages.
    """

    def forward_step(
        numbered: Iterator[tuple[int, Batch]], chunk: torch.nn.Module
    ) -> tuple[Any, Callable[[HiddenStates], Any]]:
        micro_batch_index, batch = next(numbered)
        inputs = (batch.tokens, batch.position_ids, batch.attention_mask)
        if backward_filter is not None:
            backward_filter.enter_forward(micro_batch_index)
        progress.tick()
        with nullcontext() if forward_only else forward_time(batch.tokens.device):
            output = chunk(*inputs, inference_context=inference_context)
        if backward_filter is not None:
            last = output.heads[0] if isinstance(output, HiddenStates) else output
            backward_filter.enter_backward(micro_batch_index, last, batch.tokens.shape)
        return output, partial(last_stage, micro_batch_index, batch)

    first = micro_batches[0]
    rows, length = row_shape(model_chunks[0], first.tokens.size(0), first.sample_length, first.attention_mask)
    if backward_filter is not None:
        backward_filter.begin_step(len(micro_batches), rows)
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(enumerate(micro_batches)) for _ in model_chunks],
        model=list(model_chunks),
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    if backward_filter is not None:
        backward_filter.end_step()
    return reports
