"""Qwen3: normalized queries and keys."""

from __future__ import annotations

from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.decoder import (
    decoder_fields,
    decoder_settings,
    dense_weights,
    optional_window,
)
from megatron_slm.checkpoint.huggingface.family import Family
from megatron_slm.config.schema import ModelConfig


def read_settings(config: PublishedConfig) -> dict[str, Any]:
    """Return the settings of a published model."""
    config.expect("attention_bias", (False, None), "Megatron-Core adds biases to all linear layers or to none")
    settings = decoder_settings(config, query_groups=32, head_width=128)
    return optional_window(config, settings | {"qk_layernorm": True})


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    return decoder_fields(model) | {"attention_bias": False, "use_sliding_window": False}


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read_settings, write_fields, dense_weights)
