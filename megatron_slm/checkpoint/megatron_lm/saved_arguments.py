"""Arguments of Megatron-LM for our checkpoints, from which it takes the model with --use-checkpoint-args."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_slm.config.activation import activation_name
from megatron_slm.config.recipe import settings, to_flat_dict
from megatron_slm.config.schema import RunConfig

# Settings of the model without a counterpart of the same name and meaning in Megatron-LM.
_OWN = ("activation", "disable_bias_linear", "transformer_impl")
_GROUPS = ("model", "parallel", "training", "optimizer")
_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
# Features that are never used here.
_OFF = (
    *("apply_query_key_layer_scaling", "rotary_interleaved", "use_rotary_position_embeddings"),
    *("multi_latent_attention", "bias_gelu_fusion", "moe_router_enable_expert_bias"),
)


def megatron_arguments(config: RunConfig, *, padded_vocab_size: int, step: int, consumed_samples: int) -> Namespace:
    """Return the arguments; all values are plain, so that every version of Megatron-LM can read them."""
    values = to_flat_dict(config)
    names = [setting.name for group, setting, _ in settings() if group in _GROUPS and setting.name not in _OWN]
    named = {name: values[name] for name in (*names, *_TOKENIZER) if not name.startswith("slm_")}
    plain = {name: value for name, value in named.items() if value is None or isinstance(value, str | int | float)}
    return Namespace(
        **(dict.fromkeys(_OFF, False) | plain | _model_arguments(config)),
        ckpt_format="torch_dist",
        no_save_optim=not config.checkpoint.save_optim,
        no_save_rng=True,  # random states are saved in another structure
        padded_vocab_size=padded_vocab_size,
        iteration=step,
        consumed_train_samples=consumed_samples,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )


def _model_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the arguments of the model whose names or values differ from our settings."""
    model, activation = config.model, activation_name(config.model)
    return {
        "add_bias_linear": not model.disable_bias_linear,
        "add_qkv_bias": model.add_qkv_bias or not model.disable_bias_linear,
        "layernorm_epsilon": model.norm_epsilon,
        "add_position_embedding": True,
        "num_query_groups": model.num_query_groups if model.group_query_attention else 1,
        "swiglu": activation == "swiglu",
        "squared_relu": activation == "squared_relu",
        "openai_gelu": activation == "gelu_tanh",
        "moe_layer_freq": 1,
        "moe_router_score_function": "softmax",
    }
