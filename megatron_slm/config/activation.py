"""The activation that the settings of a model name."""

from __future__ import annotations

from megatron_slm.config.schema import ModelConfig


def activation_name(model: ModelConfig) -> str:
    """Return the activation of the MLP. Configurations of earlier versions have no such setting."""
    return model.activation or ("swiglu" if model.swiglu else "gelu")


def is_gated(model: ModelConfig) -> bool:
    """Return whether the MLP is a gated linear unit."""
    return activation_name(model) in ("swiglu", "geglu")
