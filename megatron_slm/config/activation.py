"""The activation that the settings of a model name."""

from __future__ import annotations

from megatron_slm.config.schema import ModelConfig


def activation_name(model: ModelConfig) -> str:
    """Return the activation of the MLP. Configurations of earlier versions have no such setting."""
    return model.activation or ("swiglu" if model.swiglu else "gelu")


def default_ffn_size(model: ModelConfig) -> int:
    """Return the width of an MLP: 4h, or if it is gated 8h/3 rounded down to a multiple of 64, as in Megatron-LM."""
    hidden = model.hidden_size
    return max(hidden * 8 // 3 // 64 * 64, 64) if is_gated(model) else 4 * hidden


def is_gated(model: ModelConfig) -> bool:
    """Return whether the MLP is a gated linear unit."""
    return activation_name(model) in ("swiglu", "geglu")
