"""Forward pass of the reference model in the bubbles of the training model's 1F1B pipeline schedule.

The reference model is frozen, so the micro-batches of the next step can be scored during this one. A stage has no work
between its first forward passes and its first backward pass, the longer the earlier the stage, and after its last
backward pass, the longer the later the stage. Micro-batches that fit into neither are scored before the next step.

The division is that of :mod:`megatron_slm.reference.bubble_plan`. A stage sends an output in the part of the step in
which the next stage needs it. Thus every message is received without waiting for the training model, and messages never
block those of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_slm.data.batches import MicroBatch
from megatron_slm.model.gpt import model_config
from megatron_slm.model.packed_documents import row_shape
from megatron_slm.objective.tokens import ReferenceScores
from megatron_slm.reference.bubble_plan import AFTER_BACKWARD, BEFORE_BACKWARD, NEXT_STEP, Plan
from megatron_slm.reference.replica import ReferenceReplica
from megatron_slm.runtime.groups import Groups, pipeline_group


@dataclass
class PartialForward:
    """Run the reference model forward over the micro-batches of one step, in parts. Collective over its pipeline."""

    replica: ReferenceReplica
    micro_batches: Sequence[MicroBatch]
    plan: Plan
    groups: Groups
    pipeline: dist.ProcessGroup
    scores: list[ReferenceScores] = field(default_factory=list)  # on the last stage
    _outputs: dict[int, Tensor] = field(default_factory=dict)  # to be sent
    _sent: list[tuple[dist.Work | None, Tensor]] = field(default_factory=list)
    _computed: int = 0

    @torch.no_grad()
    def run(self, part: int) -> None:
        """Compute the micro-batches of a part, and send those that the next stage computes in it."""
        self.send(part)
        for index in range(self._computed, self.plan[self.groups.pp_rank][part]):
            self._compute(index)
            self.send(part)

    def send(self, part: int) -> None:
        """Send the outputs that the next stage, which has begun this part, needs in it."""
        due = 0 if self.groups.is_last_stage else self.plan[self.groups.pp_rank + 1][part]
        for index in [index for index in self._outputs if index < due]:
            output = self._outputs.pop(index)
            self._sent.append((dist.isend(output, group=self.pipeline, group_dst=self.groups.pp_rank + 1), output))

    def finish(self) -> list[ReferenceScores]:
        """Run the remaining micro-batches; return the scores of all on the last stage, an empty list elsewhere."""
        self.run(NEXT_STEP)
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        return self.scores

    def _compute(self, index: int) -> None:
        (chunk,), batch = self.replica.chunks, self.micro_batches[index]
        received = None if self.groups.is_first_stage else self._receive(batch)
        get_attr_wrapped_model(chunk, "set_input_tensor")([received])
        output = chunk(batch.tokens, batch.position_ids, batch.attention_mask)
        self._computed += 1
        if self.groups.is_last_stage:
            self.scores.append(self.replica.token_scores(batch, output))
        else:
            self._outputs[index] = output.contiguous()

    def _receive(self, batch: MicroBatch) -> Tensor:
        config, (samples, length) = model_config(self.replica.chunks), batch.tokens.shape
        rows, length = row_shape(self.replica.chunks[0], samples, length, batch.attention_mask)
        length //= self.groups.tp_size if config.sequence_parallel else 1
        shape = (length, rows, config.hidden_size)
        received = torch.empty(shape, dtype=config.pipeline_dtype, device=self.groups.device)
        dist.recv(received, group=self.pipeline, group_src=self.groups.pp_rank - 1)
        return received


class BubbleReference:
    """Implement a reference source that scores the micro-batches of the next step during this one."""

    def __init__(self, replica: ReferenceReplica, plan: Plan, chunk: torch.nn.Module, groups: Groups) -> None:
        """Insert the parts into the training model's schedule. Collective over all ranks.

        Args:
            replica: reference model with one chunk per stage.
            plan: division of the micro-batches of a step.
            chunk: training model's chunk on this stage, with its optimizer.
        """
        self.replica, self.plan, self.groups = replica, plan, groups
        self.upcoming: Sequence[MicroBatch] | None = None  # micro-batches to score during the next step
        self._pipeline = pipeline_group(groups)
        self._next: PartialForward | None = None
        self._forwards = 0
        chunk.register_forward_hook(self._after_forward)
        schedule = model_config([chunk])
        finalize = schedule.finalize_model_grads_func
        assert finalize is not None, "set by build_optimizer"

        def score_and_finalize(*args: Any, **options: Any) -> Any:
            if self._next is not None:
                self._next.run(AFTER_BACKWARD)
            return finalize(*args, **options)

        schedule.finalize_model_grads_func = score_and_finalize

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[ReferenceScores]:
        """Compute what is missing of the reference scores. Collective over all ranks of the replica.

        Returns:
            one entry per micro-batch on the last pipeline stage, an empty list on other stages.
        """
        begun, self._next, self._forwards = self._next, None, 0
        if begun is not None and begun.micro_batches is micro_batches:
            scores = begun.finish()
        else:
            scores = self.replica.score(micro_batches)
        if self.upcoming is not None:
            self._next = PartialForward(self.replica, self.upcoming, self.plan, self.groups, self._pipeline)
        return scores

    def _after_forward(self, chunk: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Use the first bubble after the last forward pass before the first backward pass.

        The next stage needs the output of that forward pass only after its first backward pass. When the last backward
        pass starts, the next stage has completed its last one.
        """
        if self._next is None or not torch.is_grad_enabled():
            return
        self._forwards += 1
        if self._forwards == self.groups.pp_size - self.groups.pp_rank:
            self._next.run(BEFORE_BACKWARD)
        if self._forwards == len(self._next.micro_batches) and not self.groups.is_last_stage:
            output.register_hook(self._before_last_backward)

    def _before_last_backward(self, _: Tensor) -> None:
        if self._next is not None:
            self._next.send(AFTER_BACKWARD)
