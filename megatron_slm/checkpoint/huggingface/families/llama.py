"""Llama 2, 3 and 3.x, TinyLlama, SmolLM2 and other models of type llama."""

from __future__ import annotations

from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.decoder import decoder_fields, decoder_settings, dense_weights
from megatron_slm.checkpoint.huggingface.family import Family
from megatron_slm.config.schema import ModelConfig


def read_settings(config: PublishedConfig) -> dict[str, Any]:
    """Return the settings of a published model."""
    bias = config.switch("attention_bias", False)
    if config.switch("mlp_bias", False) != bias:
        raise config.error(
            "attention_bias and mlp_bias differ, which is not supported: Megatron-Core adds biases to all linear "
            "layers or to none"
        )
    return decoder_settings(config, query_groups=None, head_width=None) | {"disable_bias_linear": not bias}


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    bias = not model.disable_bias_linear
    return decoder_fields(model) | {"attention_bias": bias, "mlp_bias": bias}


FAMILY = Family("llama", "LlamaForCausalLM", read_settings, write_fields, dense_weights)
