"""Minimal Megatron-Core training loop, without selection, metrics or checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_slm.data.batches import MicroBatch
from megatron_slm.model.gpt import GPT
from megatron_slm.training.loop import Run


class BareLoop:
    """Run CLM steps with Megatron-Core's model class, output layer and cross-entropy.

    Args:
        run: provides the same model, optimizer and schedule; its model is converted in place.
        fused: use Megatron-Core's fused cross-entropy.
    """

    def __init__(self, run: Run, *, fused: bool) -> None:
        self.run = run
        for chunk in run.state.model_chunks:
            for module in chunk.modules():
                if isinstance(module, GPT):
                    module.__class__ = GPTModel  # GPT adds only methods to Megatron-Core's model
                    module.config.cross_entropy_loss_fusion = fused
                    module.config.cross_entropy_fusion_impl = "native"

    def step(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Run one optimizer step, and return its mean loss."""
        state = self.run.state
        for chunk in state.model_chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        state.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(micro_batches),
            model=list(state.model_chunks),
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].sample_length,
            micro_batch_size=micro_batches[0].tokens.size(0),
            forward_only=False,
        )
        state.optimizer.step()
        state.scheduler.step(increment=self.run.shape.global_batch_size)
        total = torch.stack(reports).sum(0)
        return float(total[0] / total[1])


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, partial[tuple[Tensor, ...]]]:
    batch = next(batches)
    output = model(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels)
    return output, partial(_mean_over_valid, batch.loss_mask)


def _mean_over_valid(valid: Tensor, token_loss: Tensor) -> tuple[Tensor, ...]:
    loss, count = (token_loss.float() * valid).sum(), valid.sum()
    return loss, count.int(), torch.stack((loss.detach(), count.float()))
