"""Rotary embeddings in ``config.json``: rope_theta with rope_scaling, or transformers 5's rope_parameters."""

from __future__ import annotations

from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.config.schema import ModelConfig

# Parameters of Llama 3's scaling that Megatron-Core fixes.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rotary_settings(config: PublishedConfig, default_base: float, default_share: float | None) -> dict[str, Any]:
    """Return the settings of the rotary embeddings.

    Args:
        default_base: the family's default of rope_theta.
        default_share: the family's default of partial_rotary_factor; None: it rotates all channels.

    Raises:
        ConfigError: the kind of scaling or one of its parameters is not supported.
    """
    parameters = _parameters(config)
    base = parameters.number("rope_theta", config.number("rope_theta", default_base))
    if not base.is_integer():
        raise config.error(f"rope_theta {base} is not supported; Megatron-Core's base is an integer")
    share = parameters.number("partial_rotary_factor", config.number("partial_rotary_factor", default_share or 1.0))
    if default_share is None and share != 1:
        raise config.error(
            f"partial_rotary_factor {share} is not supported: this family rotates all channels of a head"
        )
    settings: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": int(base),
        "rotary_percent": share,
    }
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind == "llama3":
        for name, value in LLAMA3.items():
            if parameters.number(name, value) != value:
                raise config.error(
                    f"{name} {parameters.number(name):g} of the llama3 rope scaling is not supported; Megatron-Core "
                    f"has {value:g}"
                )
        settings |= {"use_rope_scaling": True, "rope_scaling_factor": parameters.number("factor")}
    elif kind == "linear":
        settings["rotary_seq_len_interpolation_factor"] = parameters.integer("factor")
    elif kind != "default":
        raise config.error(f"rope scaling {kind!r} is not supported; supported are default, linear and llama3")
    return settings


def _parameters(config: PublishedConfig) -> PublishedConfig:
    """Return the parameters in either spelling; both may be present if they agree."""
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    if kinds := [name for section in (new, old) for name, value in section.values.items() if isinstance(value, dict)]:
        raise config.error(f"rope parameters that differ between layers ({', '.join(kinds)}) are not supported")
    for name in new.values.keys() & old.values.keys():
        if new.values[name] != old.values[name]:
            raise config.error(
                f"rope_parameters and rope_scaling have different values of {name}: {new.values[name]!r} and "
                f"{old.values[name]!r}"
            )
    return PublishedConfig(config.path, config.flag, old.values | new.values)


def rotary_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``config.json``, in the spelling that all versions of the transformers library read."""
    fields: dict[str, Any] = {"rope_theta": float(model.rotary_base), "rope_scaling": None}
    if model.use_rope_scaling:
        fields["rope_scaling"] = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3}
    elif model.rotary_seq_len_interpolation_factor:
        fields["rope_scaling"] = {"rope_type": "linear", "factor": float(model.rotary_seq_len_interpolation_factor)}
    return fields
