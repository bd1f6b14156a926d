"""MLP activation: its name and the MLP size that it implies."""

from __future__ import annotations

from megatron_slm.config.schema import ModelConfig


def activation_name(model: ModelConfig) -> str:
    """Return the activation of the MLP. Configurations of earlier versions lack the setting."""
    return model.activation or ("swiglu" if model.swiglu else "gelu")


def default_ffn_size(model: ModelConfig) -> int:
    """Return the default MLP hidden size: 4h, or 8h/3 rounded down to a multiple of 64 if gated, as in Megatron-LM."""
    hidden = model.hidden_size
    return max(hidden * 8 // 3 // 64 * 64, 64) if is_gated(model) else 4 * hidden


def is_gated(model: ModelConfig) -> bool:
    """Return whether the MLP is a gated linear unit."""
    return activation_name(model) in ("swiglu", "geglu", "geglu_tanh")
