"""Runs micro-batches through a model with Megatron-Core's pipeline schedules, forward only or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_slm.data.batches import MicroBatch
from megatron_slm.objective.linear_cross_entropy.forward_grad_mask import ForwardGradMask

Report = TypeVar("Report")
EarlyOf = Callable[[int, MicroBatch], ForwardGradMask | None]
LossOf = Callable[[int, MicroBatch, Tensor], tuple[Tensor, Tensor, Report]]


def run_pipeline(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss_of: LossOf[Report],
    *,
    forward_only: bool,
    early_of: EarlyOf | None = None,
) -> list[Report]:
    """Run all micro-batches of a step: 1F1B, or the interleaved schedule where there are several chunks.

    Args:
        chunks: this rank's model chunks.
        micro_batches: of this data-parallel rank, the same on all its tensor and pipeline ranks.
        loss_of: called on the last stage with the number of the micro-batch, the micro-batch and the model's output
            (token losses); gives the sum to differentiate, the number of tokens that it is to be divided by, and
            what to report. Megatron-Core divides by the sum of those numbers over the global batch.
        forward_only: no backward pass.
        early_of: called on the last stage with the number of the micro-batch and the micro-batch before its forward
            pass; gives the tokens whose gradient may be computed at once.

    Returns:
        what ``loss_of`` reported, one entry per micro-batch, on the last stage; nothing elsewhere.
    """

    def forward_step(
        numbered: Iterator[tuple[int, MicroBatch]], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        number, batch = next(numbered)
        early = {}
        if early_of is not None and get_attr_wrapped_model(chunk, "post_process"):
            early["early"] = early_of(number, batch)
        output = chunk(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels, **early)
        return output, partial(loss_of, number, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(enumerate(micro_batches)) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].sample_length,
        micro_batch_size=micro_batches[0].tokens.size(0),
        forward_only=forward_only,
    )
