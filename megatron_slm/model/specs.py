"""Specifications of transformer layers: local (torch) on every device, Transformer Engine on GPUs.

The local specification is Megatron-Core's with two submodules replaced: a torch norm that supports sequence
parallelism, and attention by torch's ``scaled_dot_product_attention``, which stores no [s, s] score matrix.
"""

from __future__ import annotations

import importlib.util
from functools import partial

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
from megatron_slm.mcore.transformer_engine import engine_problem
from megatron_slm.model.filtered_backward import (
    FilteredMLP,
    FilteredQueryLinear,
    FilteredRowLinear,
    FirstMLPLinear,
    LastMLPLinear,
)
from megatron_slm.model.selected_tokens import BackwardFilter
from megatron_slm.runtime.errors import ConfigError

IN_FP32 = "neither --bf16 nor --fp16"  # obstacle to Transformer Engine


def choose_implementation(requested: str | None, device: torch.device, params_dtype: str) -> str:
    """Return the layer implementation: the requested one, else Transformer Engine if available, else local.

    Without a request, layers in fp32 are local: Transformer Engine multiplies fp32 in TF32, and its attention stores
    all scores.

    Raises:
        ConfigError: Transformer Engine is requested and not available.
    """
    if requested == "local":
        return requested
    problem = engine_obstacle(device)
    if requested is not None and problem is not None:
        raise ConfigError(
            f"--transformer-impl transformer_engine: {problem}. Use --transformer-impl local, or omit the flag."
        )
    is_engine = problem is None and (requested is not None or params_dtype != "fp32")
    return "transformer_engine" if is_engine else "local"


def engine_obstacle(device: torch.device) -> str | None:
    """Return the reason why layers cannot be Transformer Engine's; None if they can."""
    if device.type == "cuda":
        return engine_problem()
    return "there is no GPU" if importlib.util.find_spec("transformer_engine") else "it is not installed"


def local_reason(device: torch.device, params_dtype: str) -> str:
    """Return the reason why the layers of a model are local, given that they are."""
    if (problem := engine_obstacle(device)) is not None:
        return f"Transformer Engine: {problem}"
    return IN_FP32 if params_dtype == "fp32" else "--transformer-impl local"


def layer_spec(
    model: ModelConfig,
    config: TransformerConfig,
    implementation: str,
    vp_stage: int | None,
    pp_rank: int,
    backward_filter: BackwardFilter | None = None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the specification of the transformer layers of one model chunk.

    With a ``backward_filter``, linear layers and MLP are ours, and Transformer Engine provides norms and attention.
    """
    if implementation == "transformer_engine" and backward_filter is None:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=model.num_experts, moe_grouped_gemm=model.moe_grouped_gemm, qk_layernorm=model.qk_layernorm
        )
    if model.num_experts is not None:
        define_te_general_gemm()
    spec = get_gpt_layer_local_spec(
        num_experts=model.num_experts, qk_layernorm=model.qk_layernorm, normalization=model.normalization
    )
    norm, core_attention = norm_and_attention(implementation)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = core_attention
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    if backward_filter is not None:
        filter_linear_layers(spec, backward_filter)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=norm)


def norm_and_attention(implementation: str) -> tuple[type, type]:
    """Return the modules of norms and of attention."""
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

        return TENorm, TEDotProductAttention
    return TorchNorm, TorchAttention


def filter_linear_layers(spec: ModuleSpec, backward_filter: BackwardFilter) -> None:
    """Replace the linear layers and the MLP of a transformer layer by those with a filtered backward pass."""
    attention, filtered = spec.submodules.self_attention.submodules, {"backward_filter": backward_filter}
    attention.linear_qkv = partial(FilteredQueryLinear, **filtered)
    attention.linear_proj = ModuleSpec(module=FilteredRowLinear, params=filtered)
    mlp = spec.submodules.mlp
    mlp.module, mlp.params = FilteredMLP, filtered
    mlp.submodules.linear_fc1, mlp.submodules.linear_fc2 = FirstMLPLinear, LastMLPLinear


def mtp_heads_spec(
    config: TransformerConfig,
    layers: ModuleSpec | TransformerBlockSubmodules,
    implementation: str,
    vp_stage: int | None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the specification of the MTP heads; None on chunks without MTP heads."""
    uses_engine = implementation == "transformer_engine"
    spec = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=uses_engine, vp_stage=vp_stage)
    if spec is not None and not uses_engine:
        for layer in spec.layer_specs:
            submodules = layer.submodules
            submodules.enorm = submodules.hnorm = submodules.layer_norm = TorchNorm
    return spec
