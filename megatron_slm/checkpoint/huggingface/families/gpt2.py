"""GPT-2: learned positions, LayerNorm, biases, and matrices stored as [in, out]."""

from __future__ import annotations

from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.family import Family, Weight, published_activation
from megatron_slm.checkpoint.huggingface.layouts import FusedQueryKeyValue, Same, Transposed
from megatron_slm.config.schema import ModelConfig

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
LAYER = "transformer.h.{layer}"
ATTENTION = "decoder.layers.self_attention"
MLP = "decoder.layers.mlp"


def read_settings(config: PublishedConfig) -> dict[str, Any]:
    """Return the settings of a published model."""
    config.expect("scale_attn_weights", (True,), "attention is scaled by the square root of the head size")
    config.expect("scale_attn_by_inverse_layer_idx", (False,), "attention is scaled equally in all layers")
    config.expect("add_cross_attention", (False,), "models are decoder-only")
    heads, hidden = config.integer("n_head"), config.integer("n_embd")
    if hidden % heads:
        raise config.error(f"n_head {heads} does not divide n_embd {hidden}")
    positions = config.integer("n_positions")
    return {
        "num_layers": config.integer("n_layer"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.integer("n_inner", 4 * hidden),
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
        "max_position_embeddings": positions,
        "seq_length": positions,
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "swiglu": False,
        "activation": config.choice("activation_function", "gelu_new", ACTIVATIONS),
        "disable_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.switch("tie_word_embeddings", True),
        "attention_dropout": config.number("attn_pdrop", 0.1),
        "hidden_dropout": config.number("resid_pdrop", 0.1),
        "init_method_std": config.number("initializer_range", 0.02),
        "vocab_size": config.integer("vocab_size"),
    }


def write_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``."""
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": published_activation(model, ACTIVATIONS),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "initializer_range": model.init_method_std,
    }


def weights(model: ModelConfig) -> list[Weight]:
    """Return the weights with their published names."""
    fused = FusedQueryKeyValue(model.num_attention_heads, model.kv_channels)
    found = [
        Weight("embedding.word_embeddings.weight", ("transformer.wte.weight",), is_vocabulary=True),
        Weight("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
    ]
    for kind, matrix in (("weight", Transposed()), ("bias", Same())):
        found += [
            Weight(f"{ATTENTION}.linear_qkv.layer_norm_{kind}", (f"{LAYER}.ln_1.{kind}",)),
            Weight(f"{ATTENTION}.linear_qkv.{kind}", (f"{LAYER}.attn.c_attn.{kind}",), fused),
            Weight(f"{ATTENTION}.linear_proj.{kind}", (f"{LAYER}.attn.c_proj.{kind}",), matrix),
            Weight(f"{MLP}.linear_fc1.layer_norm_{kind}", (f"{LAYER}.ln_2.{kind}",)),
            Weight(f"{MLP}.linear_fc1.{kind}", (f"{LAYER}.mlp.c_fc.{kind}",), matrix),
            Weight(f"{MLP}.linear_fc2.{kind}", (f"{LAYER}.mlp.c_proj.{kind}",), matrix),
            Weight(f"decoder.final_layernorm.{kind}", (f"transformer.ln_f.{kind}",)),
        ]
    if model.untie_embeddings_and_output_weights:
        found.append(Weight("output_layer.weight", ("lm_head.weight",), is_vocabulary=True))
    return found


FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    read_settings,
    write_fields,
    weights,
    prefix="transformer.",
    ignored=(r"\.attn\.(bias|masked_bias)$",),
)
