"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

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
    settings = decoder_settings(config, query_groups=32, head_width=None)
    return optional_window(config, settings | {"add_qkv_bias": True})


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    return decoder_fields(model) | {"use_sliding_window": False}


FAMILY = Family("qwen2", "Qwen2ForCausalLM", read_settings, write_fields, dense_weights)
