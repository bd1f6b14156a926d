"""Model configuration files of Megatron-Bridge and NeMo 2, which save no arguments of Megatron-LM.

Both are YAML with the fields of Megatron-Core's configurations. Objects are mappings with a key ``_target_``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.checkpoint.megatron_lm.arguments import CLASSES
from megatron_slm.runtime.errors import ConfigError, read_error

BRIDGE_FILE = "run_config.yaml"  # in the checkpoint directory, under the key model
NEMO_FILE = "context/model.yaml"  # beside the directory weights, under the key config
_NAMES = {  # field of Megatron-Core: argument of Megatron-LM
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
}
_SWITCHES = {  # (activation function, gated): switch of Megatron-LM
    ("silu", True): "swiglu",
    ("swish", True): "swiglu",
    ("gelu", True): "geglu",
    ("openai_gelu", False): "openai_gelu",
    ("openai_gelu", True): "geglu_tanh",
    ("squared_relu", False): "squared_relu",
}

# Classes of models that their fields describe completely. Others define a part in Python, such as Gemma's scaled
# embeddings, the temperature of Ministral's attention, or an image encoder.
_MODELS = re.compile(
    r"(Bridge)?(GPT|(Code)?Llama(?!4)\d*|Mistral(NeMo|Small\d*)?|Mixtral|Qwen\d+(MoE)?|Nemotron\d*|Phi3|Star[cC]oder2?)"
    r"(Model)?(Config|Provider)\w*"
)
_LAYERS = re.compile(r"(default|local|quantization|modelopt|transformer_engine|get_gpt)_\w+_spec")


def read_model_file(directory: Path, flag: str) -> dict[str, Any] | None:
    """Return the model as arguments of Megatron-LM, or None if there is no such file.

    Raises:
        ConfigError: the file is unreadable or not a mapping.
    """
    for path, key in ((directory / BRIDGE_FILE, "model"), (directory.parent / NEMO_FILE, "config")):
        if not path.is_file():
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))[key]
            return as_arguments(content)
        except OSError as error:
            raise read_error(flag, path, error) from error
        except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{flag}: {path} has no model configuration under the key {key}: {error}.") from error
    return None


def as_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Megatron-Core configuration under the names of Megatron-LM's arguments."""
    if isinstance(inner := fields.get("transformer"), Mapping):  # of Megatron-Bridge's GPTModelConfig
        fields = {**inner, **fields}
    arguments = {_NAMES.get(name, name): value for name, value in fields.items()}
    if isinstance(shares := fields.get("share_embeddings_and_output_weights"), bool):
        arguments["untie_embeddings_and_output_weights"] = not shares
    if (factor := fields.get("scale_factor")) is not None:  # NeMo's configuration of Llama 3.1
        arguments |= {"use_rope_scaling": True, "rope_scaling_factor": factor}
    arguments["group_query_attention"] = fields.get("num_query_groups") is not None
    return arguments | _activation(fields) | {CLASSES: [*_unsupported_classes(fields)]}


def _unsupported_classes(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the class of the model, and the function that builds its layers, if their behavior is not known."""
    for name, value, known in (
        ("class", fields.get("_target_"), _MODELS),
        ("layer specification", fields.get("transformer_layer_spec"), _LAYERS),
    ):
        target = value.get("_target_") if isinstance(value, Mapping) else value
        if isinstance(target, str) and known.fullmatch(target.rsplit(".", 1)[-1]) is None:
            yield f"the {name} {target}"


def _activation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the activation as switches of Megatron-LM; an unknown function keeps its name, and is refused."""
    name, is_gated = _function_name(fields.get("activation_func")), bool(fields.get("gated_linear_unit"))
    if name == "gelu" and fields.get("bias_activation_fusion") and not fields.get("num_moe_experts"):
        name = "openai_gelu"  # fusion replaces GELU by its tanh approximation, except in experts
    switches: dict[str, Any] = dict.fromkeys(_SWITCHES.values(), False)
    switches |= {"bias_gelu_fusion": False, "activation_func": None}
    if (name, is_gated) in _SWITCHES:
        return switches | {_SWITCHES[name, is_gated]: True}
    return switches if (name, is_gated) == ("gelu", False) else switches | {"activation_func": name}


def _function_name(function: Any) -> str:
    """Return the name of an activation function; one with arguments that are not known is described completely."""
    if not isinstance(function, Mapping):
        name = str(function or "gelu").rsplit(".", 1)[-1]
    else:
        name = str(function.get("_target_")).rsplit(".", 1)[-1]
        arguments = {key: value for key, value in function.items() if not key.startswith("_") or key == "_args_"}
        arguments = {key: value for key, value in arguments.items() if value}
        if (name, arguments) == ("gelu", {"approximate": "tanh"}):
            name = "openai_gelu"
        elif arguments:
            name = f"{name} with {arguments}"
    return "openai_gelu" if name == "fast_gelu" else name
