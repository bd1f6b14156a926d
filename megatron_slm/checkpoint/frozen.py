"""Models without gradients from checkpoints: reference models, and models for inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron_slm.config.schema import PrecisionConfig, RunConfig
from megatron_slm.model.gpt import HIGH_PRECISION, build_model
from megatron_slm.runtime.groups import Groups


def load_frozen_model(
    config: RunConfig,
    load: Callable[[Sequence[torch.nn.Module]], None],
    *,
    vocab_size: int,
    groups: Groups,
    params_dtype: str,
    precision: PrecisionConfig = HIGH_PRECISION,
) -> list[torch.nn.Module]:
    """Build a model without MTP heads in evaluation mode, and load its weights. Collective over all ranks.

    Args:
        config: model settings, and the layout of this run.
        load: function that loads the weights into the model chunks.
        vocab_size: tokenizer size.
        groups: process groups of the layout.
        params_dtype: dtype of the weights: fp32, bf16 or fp16.
        precision: FP8 settings.
    """
    with torch.no_grad():  # without gradients, Transformer Engine keeps FP8 weights without their transpose
        chunks = build_model(
            replace(config.model, mtp_num_layers=None),
            vocab_size=vocab_size,
            parallel=replace(config.parallel, tp_comm_overlap=False),  # its buffers have the training model's size
            # without gradients, there is no buffer to which weight gradients could be added
            training=replace(config.training, recompute_granularity=None, gradient_accumulation_fusion=False),
            objective=config.objective,
            groups=groups,
            params_dtype=params_dtype,
            precision=precision,
            resets_positions=config.data.reset_position_ids,
            isolates_documents=config.data.reset_attention_mask,
        )
    load(chunks)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return chunks
