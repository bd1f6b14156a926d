"""Llama 2, 3 and 3.x, TinyLlama, SmolLM2 and other models of type llama."""

from __future__ import annotations

from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.decoder import (
    decoder_fields,
    decoder_settings,
    dense_weights,
    uniform_bias,
)
from megatron_slm.checkpoint.huggingface.family import Family
from megatron_slm.config.schema import ModelConfig


def read_settings(config: PublishedConfig) -> dict[str, Any]:
    """Return the settings of a published model."""
    settings = decoder_settings(config, query_groups=None, head_width=None)
    return settings | {"disable_bias_linear": not uniform_bias(config)}


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    bias = not model.disable_bias_linear
    return decoder_fields(model) | {"attention_bias": bias, "mlp_bias": bias}


FAMILY = Family("llama", "LlamaForCausalLM", read_settings, write_fields, dense_weights)
