"""Which modules a transformer layer is made of: plain torch everywhere, Transformer Engine on GPUs.

The plain layer is Megatron-Core's own, with two parts exchanged: a torch norm that also works under sequence
parallelism, and attention by torch's ``scaled_dot_product_attention``, which keeps no [s, s] matrix of scores.
"""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_slm.config.schema import ModelConfig
from megatron_slm.mcore.experts import define_te_general_gemm
from megatron_slm.mcore.layers import TorchAttention, TorchNorm
from megatron_slm.runtime.errors import ConfigError


def choose_implementation(wanted: str | None, device: torch.device) -> str:
    """The layer implementation: what was asked for, else Transformer Engine on a GPU that has it.

    Raises:
        ConfigError: Transformer Engine was asked for and is not there.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "transformer_engine" and not (installed and device.type == "cuda"):
        missing = "it is not installed" if not installed else "there is no GPU"
        raise ConfigError(
            f"--transformer-impl transformer_engine: {missing}. Use --transformer-impl local, or leave it out."
        )
    return wanted or ("transformer_engine" if installed and device.type == "cuda" else "local")


def layer_spec(
    model: ModelConfig, config: TransformerConfig, implementation: str, vp_stage: int | None, pp_rank: int
) -> ModuleSpec | TransformerBlockSubmodules:
    """The specification of the transformer layers of one model chunk."""
    if implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=model.num_experts, moe_grouped_gemm=model.moe_grouped_gemm, qk_layernorm=model.qk_layernorm
        )
    if model.num_experts is not None:
        define_te_general_gemm()
    spec = get_gpt_layer_local_spec(
        num_experts=model.num_experts, qk_layernorm=model.qk_layernorm, normalization=model.normalization
    )
    spec.submodules.input_layernorm = TorchNorm
    spec.submodules.pre_mlp_layernorm = TorchNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = TorchAttention
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=TorchNorm)


def further_heads_spec(
    config: TransformerConfig,
    layers: ModuleSpec | TransformerBlockSubmodules,
    implementation: str,
    vp_stage: int | None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """The specification of the heads of multi-token prediction; None on chunks that have none."""
    on_engine = implementation == "transformer_engine"
    spec = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=on_engine, vp_stage=vp_stage)
    if spec is not None and not on_engine:
        for layer in spec.layer_specs:
            parts = layer.submodules
            parts.enorm = parts.hnorm = parts.layer_norm = TorchNorm
    return spec
