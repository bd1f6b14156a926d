"""Workaround for Megatron-Core's loading of distributed checkpoints into FP8 weights."""

from __future__ import annotations

from inspect import signature

from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy


def loading_strategy() -> TorchDistLoadShardedStrategy | None:
    """Return the strategy that loads weights in high precision, before they are quantized; None for the default.

    Megatron-Core 0.19 quantizes FP8 weights while it reads them. Both halves of a gated MLP's weight would then be
    quantized by themselves, although they share one scale, and the optimizer would start from rounded main weights.
    """
    if "stream_ckpt_dequant" not in signature(TorchDistLoadShardedStrategy).parameters:
        return None
    return TorchDistLoadShardedStrategy(stream_ckpt_dequant=False)
