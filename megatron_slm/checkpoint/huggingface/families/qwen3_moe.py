"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.decoder import (
    decoder_fields,
    decoder_settings,
    decoder_weights,
    experts_mlp,
    optional_window,
)
from megatron_slm.checkpoint.huggingface.family import Family, Weight
from megatron_slm.config.schema import ModelConfig

DENSE = "models with dense layers among the experts cannot be represented"


def read_settings(config: PublishedConfig) -> dict[str, Any]:
    """Return the settings of a published model."""
    config.expect("attention_bias", (False, None), "Megatron-Core adds biases to all linear layers or to none")
    config.expect("decoder_sparse_step", (1,), DENSE)
    config.expect("mlp_only_layers", ([], None), DENSE)
    settings = decoder_settings(config, query_groups=4, head_width=None) | {
        "qk_layernorm": True,
        "num_experts": config.integer("num_experts", config.integer("num_local_experts", 128)),
        "moe_ffn_hidden_size": config.integer("moe_intermediate_size", 768),
        "moe_router_topk": config.integer("num_experts_per_tok", 8),
        "moe_router_pre_softmax": not config.switch("norm_topk_prob", False),
    }
    return optional_window(config, settings)


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    return decoder_fields(model) | {
        "attention_bias": False,
        "use_sliding_window": False,
        "num_experts": model.num_experts,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "num_experts_per_tok": model.moe_router_topk,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def weights(model: ModelConfig) -> list[Weight]:
    """Return the weights with their published names."""
    return decoder_weights(model, experts_mlp("mlp.gate", "mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"))


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read_settings, write_fields, weights)
