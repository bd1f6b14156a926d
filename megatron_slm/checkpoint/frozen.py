"""Models without gradients from checkpoints: reference models, and models for inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron_slm.config.schema import RunConfig
from megatron_slm.model.gpt import build_model
from megatron_slm.runtime.groups import Groups


def load_frozen_model(
    config: RunConfig,
    load: Callable[[Sequence[torch.nn.Module]], None],
    *,
    vocab_size: int,
    groups: Groups,
    bf16: bool,
) -> list[torch.nn.Module]:
    """Build a model without MTP heads in evaluation mode, and load its weights. Collective over all ranks.

    Args:
        config: model settings, and the layout of this run.
        load: function that loads the weights into the model chunks.
        vocab_size: tokenizer size.
        groups: process groups of the layout.
        bf16: use bfloat16 weights instead of fp32.
    """
    chunks = build_model(
        replace(config.model, mtp_num_layers=None),
        vocab_size=vocab_size,
        parallel=config.parallel,
        training=replace(config.training, recompute_granularity=None),
        objective=config.objective,
        groups=groups,
        bf16=bf16,
        resets_positions=config.data.reset_position_ids,
    )
    load(chunks)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return chunks
