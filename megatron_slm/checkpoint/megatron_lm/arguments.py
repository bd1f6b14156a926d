"""Settings from the arguments that Megatron-LM saves in its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_slm.config.constraints import violations
from megatron_slm.config.recipe import convert, settings
from megatron_slm.config.resume import RULES, Rule
from megatron_slm.runtime.errors import ConfigError

# Other names of settings in the arguments, by version of Megatron-LM.
OTHER_NAMES = {"norm_epsilon": "layernorm_epsilon"}
# Settings outside of the model that are compared with those of a resumed run.
COMPARED = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "micro_batch_size", "global_batch_size", "train_iters", "train_samples"),
    *("seed", "bf16", "fp16", "optimizer", "use_distributed_optimizer"),
)
TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
NULLABLE = ("num_experts", "mtp_num_layers", "rotary_seq_len_interpolation_factor")  # unset is a value
_SPECIAL = ("swiglu", "activation", "disable_bias_linear", "group_query_attention", "num_query_groups")
_UNRECORDED = ("transformer_impl", "vocab_size")  # choices of a run; the vocabulary size is saved with its padding

CLASSES = "unsupported_classes"  # entry of the arguments with descriptions of unsupported classes in a model file
# Model features without a setting here, with the values that have no effect; None and False never have one.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (),
    "experimental_attention_variant": (),
    "apply_residual_connection_post_layernorm": (),
    "qk_l2_norm": (),
    "attention_output_gate": (),
    "window_size": (),
    "softmax_type": ("vanilla",),
    "softmax_scale": (),
    "no_rope_freq": (),
    "rotary_interleaved": (),
    "quick_geglu": (),
    "activation_func": (),
    "glu_linear_offset": (0,),
    "activation_func_clamp_value": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_mup": (),
    "use_legacy_models": (),
    "heterogeneous_layers_config_path": (),
    "heterogeneous_layers_config_encoded_json": (),
    "hybrid_layer_pattern": (),
    "hybrid_override_pattern": (),
    "is_hybrid_model": (),
    "spec": (),
    "linear_attention_freq": (),
    "mtp_use_repeated_layer": (),
    "mtp_hsm": (),
    "enable_mhc_connections": (),
}
UNSUPPORTED_WITH_EXPERTS: dict[str, tuple[Any, ...]] = {
    "moe_layer_freq": (1,),
    "moe_shared_expert_intermediate_size": (0,),
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (),
    "moe_router_topk_scaling_factor": (1,),
    "moe_router_num_groups": (),
    "moe_latent_size": (),
    "moe_apply_probs_on_input": (),
    "moe_router_topk_limited_devices": (),
    "moe_mlp_glu_interleave_size": (),
}


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the arguments record, by name; values of other types count as not recorded."""
    recorded = dict(_plain_settings(arguments))
    if (bias := _boolean(arguments, "add_bias_linear")) is not None:
        recorded["disable_bias_linear"] = not bias
    if bias:
        recorded.pop("add_qkv_bias", None)  # implied, and set by Megatron-LM
    recorded |= _activation(arguments) | _query_groups(arguments)
    recorded |= {name: None for name in NULLABLE if name in arguments and not arguments[name]}
    if _boolean(arguments, "use_rotary_position_embeddings"):  # an earlier spelling
        recorded["position_embedding_type"] = "rope"
    if not recorded.get("use_rope_scaling"):
        recorded.pop("rope_scaling_factor", None)  # without effect; the trainers have different defaults
    return recorded


def unsupported_features(arguments: Mapping[str, Any]) -> list[str]:
    """Return a description of every feature of the model that has no setting here."""
    features = dict(UNSUPPORTED)
    if arguments.get("num_experts"):
        features |= UNSUPPORTED_WITH_EXPERTS
    values = {name: arguments.get(name) for name, neutral in features.items()}
    found = {name: value for name, value in values.items() if not _is_neutral(value, features[name])}
    found |= _unrepresentable(arguments)
    flags = {f"--{name.replace('_', '-')}": value for name, value in found.items()}
    return [
        *arguments.get(CLASSES, ()),
        *(flag if value is True else f"{flag} {value}" for flag, value in flags.items()),
    ]


def _unrepresentable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values of the model that its settings here cannot have, such as a rotary base of 10000.5."""
    recorded = dict(_plain_settings(arguments))
    values = {
        name: _value(arguments, name)
        for name, rule in RULES.items()
        if rule in (Rule.STRUCTURE, Rule.ERROR) and name not in (*recorded, *_SPECIAL)
    }
    unset = {name for name in NULLABLE if not values.get(name)}
    return {name: value for name, value in values.items() if isinstance(value, str | int | float) and name not in unset}


def _value(arguments: Mapping[str, Any], name: str) -> Any:
    value = arguments.get(name, arguments.get(OTHER_NAMES.get(name, name)))
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(value, list | tuple):
        return bool(neutral) and all(each in neutral for each in value)
    return value is None or value is False or value in neutral


def _plain_settings(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings with the same name and meaning as an argument."""
    for group, setting, kind in settings():
        name = setting.name
        is_model = group == "model" or RULES.get(name) is Rule.STRUCTURE
        if not (is_model or name in COMPARED or name in TOKENIZER) or name in (*_SPECIAL, *_UNRECORDED):
            continue
        value = _value(arguments, name)
        if value is None:
            continue
        try:
            converted = convert(value, kind, name)
        except (ConfigError, TypeError):
            continue
        if not any(violations(setting, converted)):
            yield name, converted


def _activation(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the activation.

    Megatron-LM's fused GELU, which needs biases, and Transformer Engine's GELU are the tanh approximation.
    """
    switches = {name: _boolean(arguments, name) for name in ("swiglu", "openai_gelu")}
    if all(value is None for value in switches.values()):
        return {}
    fused = _boolean(arguments, "bias_gelu_fusion") and _boolean(arguments, "add_bias_linear") is not False
    name = "gelu_tanh" if switches["openai_gelu"] or fused else "gelu"
    for switch in ("squared_relu", "geglu", "geglu_tanh"):
        name = switch if _boolean(arguments, switch) else name
    if name in ("gelu", "geglu") and _boolean(arguments, "use_te_activation_func"):
        name = f"{name}_tanh"
    return {"swiglu": bool(switches["swiglu"]), "activation": None if switches["swiglu"] else name}


def _query_groups(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of grouped-query attention; without it, Megatron-LM saves one group."""
    grouped, groups = _boolean(arguments, "group_query_attention"), arguments.get("num_query_groups")
    if grouped is False:
        return {"group_query_attention": False, "num_query_groups": None}
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        return {}
    if groups == arguments.get("num_attention_heads"):
        return {"group_query_attention": False, "num_query_groups": None}
    return {"group_query_attention": True, "num_query_groups": groups}


def _boolean(arguments: Mapping[str, Any], name: str) -> bool | None:
    value = arguments.get(name)
    return value if isinstance(value, bool) else None
