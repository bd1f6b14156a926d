"""Nemotron 3 and 4, Minitron: LayerNorm with weights stored less 1, squared ReLU, rotation of half of the channels."""

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

ACTIVATIONS = {"relu2": "squared_relu"}


def read_settings(config: PublishedConfig) -> dict[str, Any]:
    """Return the settings of a published model."""
    settings = decoder_settings(config, query_groups=None, head_width=None, rotary_share=0.5, activations=ACTIVATIONS)
    return settings | {
        "normalization": "LayerNorm",
        "apply_layernorm_1p": True,
        "norm_epsilon": config.number("norm_eps", 1e-5),
        "init_method_std": config.number("initializer_range", 0.0134),
        "disable_bias_linear": not uniform_bias(config),
    }


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    bias = not model.disable_bias_linear
    return decoder_fields(model, epsilon="norm_eps", activations=ACTIVATIONS) | {
        "partial_rotary_factor": model.rotary_percent,
        "attention_bias": bias,
        "mlp_bias": bias,
    }


FAMILY = Family("nemotron", "NemotronForCausalLM", read_settings, write_fields, dense_weights)
