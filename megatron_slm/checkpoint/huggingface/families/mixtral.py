"""Mixtral: a mixture of experts whose router normalizes the probabilities of the selected experts."""

from __future__ import annotations

from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.decoder import (
    decoder_fields,
    decoder_settings,
    decoder_weights,
    experts_mlp,
    limit_to_window,
)
from megatron_slm.checkpoint.huggingface.family import Family, Weight
from megatron_slm.config.schema import ModelConfig


def read_settings(config: PublishedConfig) -> dict[str, Any]:
    """Return the settings of a published model."""
    settings = decoder_settings(config, query_groups=8, head_width=None, rotary_base=1e6) | {
        "norm_epsilon": config.number("rms_norm_eps", 1e-5),
        "num_experts": config.integer("num_local_experts", 8),
        "moe_ffn_hidden_size": config.integer("intermediate_size"),
        "moe_router_topk": config.integer("num_experts_per_tok", 2),
        "moe_router_pre_softmax": False,
    }
    return limit_to_window(config, settings, default=None)


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    return decoder_fields(model) | {
        "intermediate_size": model.moe_ffn_hidden_size,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "sliding_window": None,
    }


def weights(model: ModelConfig) -> list[Weight]:
    """Return the weights with their published names."""
    mlp = experts_mlp("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}", "w1", "w3", "w2")
    return decoder_weights(model, mlp)


FAMILY = Family("mixtral", "MixtralForCausalLM", read_settings, write_fields, weights)
