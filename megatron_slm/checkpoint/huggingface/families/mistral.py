"""Mistral 7B and other models of type mistral."""

from __future__ import annotations

from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.decoder import (
    decoder_fields,
    decoder_settings,
    dense_weights,
    limit_to_window,
)
from megatron_slm.checkpoint.huggingface.family import Family
from megatron_slm.config.schema import ModelConfig


def read_settings(config: PublishedConfig) -> dict[str, Any]:
    """Return the settings of a published model."""
    return limit_to_window(config, decoder_settings(config, query_groups=8, head_width=None), default=4096)


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    return decoder_fields(model) | {"sliding_window": None}


FAMILY = Family("mistral", "MistralForCausalLM", read_settings, write_fields, dense_weights)
