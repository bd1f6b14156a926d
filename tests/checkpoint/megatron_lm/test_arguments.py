"""Test settings from saved arguments: missing ones, other types and versions, and unsupported features."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_slm.checkpoint.megatron_lm.arguments import settings_of, unsupported_features
from megatron_slm.checkpoint.megatron_lm.directories import locate
from megatron_slm.checkpoint.megatron_lm.model_files import as_arguments, read_model_file
from megatron_slm.checkpoint.megatron_lm.saved_arguments import megatron_arguments
from megatron_slm.checkpoint.megatron_lm.source import MegatronSource
from megatron_slm.config.activation import activation_name
from megatron_slm.config.checks import derive
from megatron_slm.config.recipe import to_flat_dict, with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError

SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 16, "ffn_hidden_size": 32}


def test_arguments_of_all_versions_give_the_same_model(recorded: Path) -> None:
    """The three versions of Megatron-LM name the normalization epsilon differently, and add arguments."""
    for name, activation in (("llama", "swiglu"), ("gpt", "gelu"), ("moe", "swiglu"), ("bf16", "swiglu")):
        config = MegatronSource.find(str(recorded / name), None, "--load").config()
        values = to_flat_dict(config)
        assert all(values[key] == value for key, value in SIZES.items() if key != "ffn_hidden_size")
        assert activation_name(config.model) == activation
        assert config.model.norm_epsilon == 1e-5 and config.model.make_vocab_size_divisible_by == 16


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_layers": None, "hidden_size": [16], "rotary_base": 1e6}, {"hidden_size": 16, "rotary_base": 1000000}),
        ({"num_layers": "many", "swiglu": "yes", "rotary_percent": 7.0}, {}),
        ({"num_experts": 0, "mtp_num_layers": None}, {"num_experts": None, "mtp_num_layers": None}),
        ({"rope_scaling_factor": 1.0}, {}),
        ({"use_rope_scaling": True, "rope_scaling_factor": 4}, {"use_rope_scaling": True, "rope_scaling_factor": 4.0}),
        ({"add_bias_linear": True, "add_qkv_bias": True}, {"disable_bias_linear": False}),
        ({"use_rotary_position_embeddings": True}, {"position_embedding_type": "rope"}),
        ({"swiglu": False, "bias_gelu_fusion": True}, {"swiglu": False, "activation": "gelu_tanh"}),
        ({"swiglu": False, "squared_relu": True}, {"swiglu": False, "activation": "squared_relu"}),
        ({"swiglu": False, "use_te_activation_func": True}, {"swiglu": False, "activation": "gelu_tanh"}),
        (
            {"group_query_attention": False, "num_query_groups": 1},
            {"group_query_attention": False, "num_query_groups": None},
        ),
    ],
)
def test_odd_and_earlier_arguments(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    assert settings_of(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"window_size": (128, 0)}, "--window-size (128, 0)"),
        ({"position_embedding_type": "yarn"}, "--position-embedding-type yarn"),
        ({"num_experts": 8, "moe_layer_freq": [0, 1]}, "--moe-layer-freq [0, 1]"),
        ({"num_experts": 8, "moe_router_score_function": "sigmoid"}, "--moe-router-score-function sigmoid"),
        ({"softmax_scale": 0.5}, "--softmax-scale 0.5"),
        ({"enable_mhc_connections": True}, "--enable-mhc-connections"),
        ({"num_experts": 8, "moe_mlp_glu_interleave_size": 32}, "--moe-mlp-glu-interleave-size 32"),
        ({"rotary_base": 10000.5}, "--rotary-base 10000.5"),
        ({"rotary_seq_len_interpolation_factor": 1.5}, "--rotary-seq-len-interpolation-factor 1.5"),
        ({"layernorm_epsilon": 0.0}, "--norm-epsilon 0.0"),
        ({"apply_residual_connection_post_layernorm": True}, "--apply-residual-connection-post-layernorm"),
    ],
)
def test_unsupported_features_are_named(arguments: dict[str, Any], feature: str) -> None:
    assert unsupported_features(arguments) == [feature]
    assert not unsupported_features({**arguments, **dict.fromkeys(arguments)})


def test_neutral_values_are_accepted() -> None:
    neutral = {
        "moe_layer_freq": [1, 1],
        "num_experts": 8,
        "moe_router_score_function": "softmax",
        "softmax_type": "vanilla",
    }
    assert not unsupported_features(neutral)


def test_our_arguments_are_read_back() -> None:
    given = {**SIZES, "activation": "gelu_tanh", "group_query_attention": True, "num_query_groups": 2, "num_experts": 4}
    config = derive(with_settings(RunConfig(), given))
    saved = vars(megatron_arguments(config, padded_vocab_size=64, step=3, consumed_samples=12))
    assert all(value is None or isinstance(value, str | int | float | bool) for value in saved.values())
    assert not unsupported_features(saved)
    again = derive(with_settings(RunConfig(), settings_of(saved)))
    assert again.model == config.model


BRIDGE = {
    "model": {
        **SIZES,
        "num_query_groups": 2,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "share_embeddings_and_output_weights": False,
        "num_moe_experts": 4,
        "layernorm_epsilon": 1e-6,
    }
}


@pytest.mark.parametrize("layout", ["bridge", "nemo"])
def test_model_files_of_other_trainers(tmp_path: Path, layout: str) -> None:
    directory = tmp_path / ("iter_0000100" if layout == "bridge" else "weights")
    directory.mkdir()
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    if layout == "bridge":
        (directory / "run_config.yaml").write_text(yaml.safe_dump(BRIDGE))
        (tmp_path / "latest_train_state.pt").write_bytes(b"")
    else:
        (tmp_path / "context").mkdir()
        (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump({"config": BRIDGE["model"]}))
    location = locate(tmp_path, None)
    assert location is not None and location.directory == directory
    assert location.is_release is (layout == "nemo")
    arguments = read_model_file(directory, "--load")
    assert arguments is not None
    recorded = settings_of(arguments)
    assert {name: recorded[name] for name in SIZES} == SIZES
    assert recorded["swiglu"] and recorded["untie_embeddings_and_output_weights"] and recorded["num_experts"] == 4
    assert recorded["num_query_groups"] == 2 and recorded["norm_epsilon"] == 1e-6


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider"}, None),
        ({"_target_": "nemo.collections.llm.gpt.model.llama.Llama31Config8B"}, None),
        ({"_target_": "nemo.collections.llm.gpt.model.gemma.GemmaConfig2B"}, "the class nemo.*GemmaConfig2B"),
        ({"_target_": "megatron.bridge.models.ministral3.ministral3_provider.Ministral3ModelProvider"}, "the class"),
        ({"_target_": "nemo.collections.llm.gpt.model.llama4.Llama4Config"}, "the class"),
        ({"transformer_layer_spec": {"_target_": "megatron.bridge.models.gpt_provider.default_layer_spec"}}, None),
        ({"transformer_layer_spec": {"_target_": "x.get_gpt_decoder_block_spec", "_partial_": True}}, None),
        ({"transformer_layer_spec": {"_target_": "x.exaone4_layer_spec"}}, r"the layer specification x\.exaone4"),
    ],
)
def test_classes_of_models(fields: dict[str, Any], refused: str | None) -> None:
    """Other classes than the known ones compute a part that their fields do not describe."""
    found = unsupported_features(as_arguments({**BRIDGE["model"], **fields}))
    assert len(found) == (refused is not None) and all(re.match(str(refused), each) for each in found)


GELU = {"_target_": "torch._C._nn.gelu", "_partial_": True, "_args_": []}


@pytest.mark.parametrize(
    ("fields", "gated", "plain"),
    [
        ({}, "geglu", "gelu"),
        ({"bias_activation_fusion": True}, "geglu_tanh", "gelu_tanh"),
        ({"bias_activation_fusion": True, "num_moe_experts": 4}, "geglu", "gelu"),
        ({"use_te_activation_func": True}, "geglu_tanh", "gelu_tanh"),
        ({"activation_func": {**GELU, "approximate": "tanh"}}, "geglu_tanh", "gelu_tanh"),
        ({"activation_func": {"_target_": "megatron.core.activations.fast_gelu"}}, "geglu_tanh", "gelu_tanh"),
        ({"activation_func": {**GELU, "approximate": "other"}}, None, None),
        ({"activation_func": "megatron.core.activations.quick_gelu"}, None, None),
    ],
)
def test_exact_and_approximate_gelu_are_distinguished(
    fields: dict[str, Any], gated: str | None, plain: str | None
) -> None:
    """Megatron-Core's fused GELU, gated or not, is the tanh approximation."""
    for expected, is_gated in ((gated, True), (plain, False)):
        arguments = as_arguments({**SIZES, **fields, "gated_linear_unit": is_gated})
        found = unsupported_features(arguments)
        assert bool(found) == (expected is None) and all("--activation-func" in each for each in found)
        assert expected is None or settings_of(arguments)["activation"] == expected


def test_sizes_in_a_nested_configuration() -> None:
    nested = {"transformer": BRIDGE["model"], "position_embedding_type": "rope"}
    recorded = settings_of(as_arguments(nested))
    assert recorded["hidden_size"] == 16 and recorded["swiglu"] and recorded["position_embedding_type"] == "rope"


def test_missing_sizes_are_named_for_a_reference_model(recorded: Path) -> None:
    source = MegatronSource.find(str(recorded / "llama"), None, "--reference-load")
    del source.arguments["num_layers"]
    with pytest.raises(ConfigError, match=r"--reference-load: .* does not record --num-layers"):
        source.config()
    assert source.config_over(with_settings(RunConfig(), {"num_layers": 7})).model.num_layers == 7
