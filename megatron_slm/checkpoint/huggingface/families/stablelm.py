"""StableLM 3B and StableLM 2 1.6B: LayerNorm, gated MLP, rotation of a quarter of the channels."""

from __future__ import annotations

from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.decoder import decoder_fields, decoder_settings, dense_weights
from megatron_slm.checkpoint.huggingface.family import Family
from megatron_slm.config.schema import ModelConfig


def read_settings(config: PublishedConfig) -> dict[str, Any]:
    """Return the settings of a published model."""
    config.expect("use_parallel_residual", (False, None), "attention and MLP of a layer run one after the other")
    config.expect("qk_layernorm", (False, None), "every head would have norm weights, which all heads share")
    return decoder_settings(config, query_groups=32, head_width=None, rotary_share=0.25) | {
        "normalization": "LayerNorm",
        "norm_epsilon": config.number("layer_norm_eps", 1e-5),
        "add_qkv_bias": config.switch("use_qkv_bias", False),
    }


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    return decoder_fields(model, epsilon="layer_norm_eps") | {
        "partial_rotary_factor": model.rotary_percent,
        "use_qkv_bias": model.add_qkv_bias,
        "use_parallel_residual": False,
        "qk_layernorm": False,
    }


FAMILY = Family("stablelm", "StableLmForCausalLM", read_settings, write_fields, dense_weights)
