"""Parts that the Llama-like families share: norms, rotary embeddings, MLP, grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.family import Weight, published_activation
from megatron_slm.checkpoint.huggingface.layouts import GateUp, QueryKeyValue, Same
from megatron_slm.checkpoint.huggingface.rotary import rotary_fields, rotary_settings
from megatron_slm.config.activation import is_gated
from megatron_slm.config.schema import ModelConfig

ACTIVATIONS = {  # of a gated MLP
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
LAYER = "model.layers.{layer}"
ATTENTION = "decoder.layers.self_attention"
MLP = "decoder.layers.mlp"


def decoder_settings(
    config: PublishedConfig,
    *,
    query_groups: int | None,
    head_width: int | None,
    rotary_base: float = 10000.0,
    rotary_share: float | None = None,
    activations: Mapping[str, str] = ACTIVATIONS,
) -> dict[str, Any]:
    """Return the settings that all Llama-like families have; those with LayerNorm replace the norm's.

    Args:
        query_groups: the family's default of num_key_value_heads; None: the number of heads.
        head_width: the family's default of head_dim; None: hidden size / heads.
        rotary_base: the family's default of rope_theta.
        rotary_share: the family's default of partial_rotary_factor; None: it rotates all channels.
        activations: setting by name of the activation; the first one is the default.

    Raises:
        ConfigError: a field is missing or cannot be represented.
    """
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    is_null = "num_key_value_heads" in config.values
    groups = config.integer("num_key_value_heads", heads if is_null or query_groups is None else query_groups)
    if heads % groups:
        raise config.error(f"num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    activation = config.choice("hidden_act", next(iter(activations)), activations)
    _check_layers(config)
    return {
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.integer("intermediate_size"),
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups if groups != heads else None,
        "kv_channels": _head_width(config, hidden, heads, head_width),
        "max_position_embeddings": config.integer("max_position_embeddings"),
        "seq_length": config.integer("max_position_embeddings"),
        "normalization": "RMSNorm",
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
        "swiglu": activation == "swiglu",
        "activation": None if activation == "swiglu" else activation,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": not config.switch("tie_word_embeddings", False),
        "attention_dropout": config.number("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "init_method_std": config.number("initializer_range", 0.02),
        "vocab_size": config.integer("vocab_size"),
        **rotary_settings(config, rotary_base, rotary_share),
    }


def _check_layers(config: PublishedConfig) -> None:
    """Raise ConfigError if a layer has another kind of attention than the sliding window, whose size is checked."""
    kinds = config.values.get("layer_types") or []
    if other := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise config.error(f"layer_types contains {other[0]!r}, which is not supported: all layers have full attention")


def _head_width(config: PublishedConfig, hidden: int, heads: int, default: int | None) -> int:
    if config.values.get("head_dim") is None and default is None and hidden % heads:
        raise config.error(f"head_dim is missing, and num_attention_heads {heads} does not divide hidden_size {hidden}")
    return config.integer("head_dim", hidden // heads if default is None else default)


def limit_to_window(config: PublishedConfig, settings: dict[str, Any], *, default: int | None) -> dict[str, Any]:
    """Limit the number of positions to the sliding window, within which it has no effect.

    Args:
        default: the family's default of sliding_window; None: attention to all tokens.
    """
    value = config.values.get("sliding_window", default)
    if value is not None:
        window = min(settings["max_position_embeddings"], config.integer("sliding_window", value))
        settings |= {"seq_length": window, "max_position_embeddings": window}
    return settings


def optional_window(config: PublishedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Limit the number of positions to the sliding window if the field use_sliding_window enables it."""
    return limit_to_window(config, settings, default=4096) if config.switch("use_sliding_window", False) else settings


def uniform_bias(config: PublishedConfig) -> bool:
    """Return whether all linear layers have biases.

    Raises:
        ConfigError: only some have.
    """
    bias = config.switch("attention_bias", False)
    if config.switch("mlp_bias", False) != bias:
        raise config.error(
            "attention_bias and mlp_bias differ, which is not supported: Megatron-Core adds biases to all linear "
            "layers or to none"
        )
    return bias


def decoder_fields(
    model: ModelConfig, *, epsilon: str = "rms_norm_eps", activations: Mapping[str, str] = ACTIVATIONS
) -> dict[str, Any]:
    """Return the fields of ``config.json`` that all Llama-like families have.

    Args:
        epsilon: the family's name of the norm's epsilon.
        activations: as for :func:`decoder_settings`.
    """
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": query_groups(model),
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        epsilon: model.norm_epsilon,
        "hidden_act": published_activation(model, activations),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        **rotary_fields(model),
    }


def query_groups(model: ModelConfig) -> int:
    """Return the number of key/value heads."""
    groups = model.num_query_groups if model.group_query_attention else None
    return groups or model.num_attention_heads


def decoder_weights(model: ModelConfig, mlp: list[Weight]) -> list[Weight]:
    """Return the weights of a Llama-like model, with the weights of its MLP after the norm."""
    projections = QueryKeyValue(model.num_attention_heads, query_groups(model), model.kv_channels)
    bias = not model.disable_bias_linear
    weights = [
        Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), is_vocabulary=True),
        Weight(f"{ATTENTION}.linear_qkv.weight", _projections("weight"), projections),
        Weight(f"{ATTENTION}.linear_proj.weight", (f"{LAYER}.self_attn.o_proj.weight",)),
        *mlp,
    ]
    for kind in ("weight",) if model.normalization == "RMSNorm" else ("weight", "bias"):
        weights += [
            Weight(f"{ATTENTION}.linear_qkv.layer_norm_{kind}", (f"{LAYER}.input_layernorm.{kind}",)),
            Weight(
                f"{MLP}.linear_fc1.layer_norm_{kind}",
                (f"{LAYER}.post_attention_layernorm.{kind}",),
                aliases=(f"decoder.layers.pre_mlp_layernorm.{kind}",),  # mixture of experts with Transformer Engine
            ),
            Weight(f"decoder.final_layernorm.{kind}", (f"model.norm.{kind}",)),
        ]
    if bias or model.add_qkv_bias:
        weights.append(Weight(f"{ATTENTION}.linear_qkv.bias", _projections("bias"), projections))
    if bias:
        weights.append(Weight(f"{ATTENTION}.linear_proj.bias", (f"{LAYER}.self_attn.o_proj.bias",)))
    if model.qk_layernorm:
        weights += [
            Weight(f"{ATTENTION}.{part}_layernorm.weight", (f"{LAYER}.self_attn.{part}_norm.weight",)) for part in "qk"
        ]
    if model.untie_embeddings_and_output_weights:
        weights.append(Weight("output_layer.weight", ("lm_head.weight",), is_vocabulary=True))
    return weights


def _projections(kind: str) -> tuple[str, ...]:
    return tuple(f"{LAYER}.self_attn.{part}_proj.{kind}" for part in "qkv")


def dense_weights(model: ModelConfig) -> list[Weight]:
    """Return the weights of a Llama-like model with a MLP in every layer, gated or not."""
    gate = ("gate_proj",) if is_gated(model) else ()
    weights = []
    for kind in ("weight",) if model.disable_bias_linear else ("weight", "bias"):
        names = tuple(f"{LAYER}.mlp.{name}.{kind}" for name in (*gate, "up_proj"))
        weights.append(Weight(f"{MLP}.linear_fc1.{kind}", names, GateUp() if gate else Same()))
        weights.append(Weight(f"{MLP}.linear_fc2.{kind}", (f"{LAYER}.mlp.down_proj.{kind}",)))
    return decoder_weights(model, weights)


def experts_mlp(router: str, expert: str, gate: str, up: str, down: str) -> list[Weight]:
    """Return the weights of a mixture of gated experts.

    Args:
        router: name of the router below a layer.
        expert: name of an expert below a layer, with {expert}.
        gate: name of the gate projection below an expert, as ``up`` and ``down``.
    """
    names = (f"{LAYER}.{expert}.{gate}.weight", f"{LAYER}.{expert}.{up}.weight")
    return [
        Weight(f"{MLP}.router.weight", (f"{LAYER}.{router}.weight",)),
        Weight(f"{MLP}.experts.experts.linear_fc1.weight", names, GateUp()),
        Weight(f"{MLP}.experts.experts.linear_fc2.weight", (f"{LAYER}.{expert}.{down}.weight",)),
    ]
