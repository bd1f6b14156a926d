"""Activation function of the MLP, identical on every device.

Megatron-Core's bias-activation fusion (``bias_activation_fusion``) replaces GELU with its tanh approximation. A fused
activation is therefore used only if it computes the configured function.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_slm.config.activation import activation_name, is_gated
from megatron_slm.config.schema import ModelConfig


def gelu_tanh(values: Tensor) -> Tensor:
    """Return the tanh approximation of GELU, as in GPT-2 and, gated, in Gemma."""
    return F.gelu(values, approximate="tanh")


def squared_relu(values: Tensor) -> Tensor:
    """Return the square of ReLU."""
    return F.relu(values).square()


FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "squared_relu": squared_relu,
}


def activation_settings(model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Return Megatron-Core's configuration fields for the activation."""
    name = activation_name(model)
    # Megatron-Core selects its fused tanh approximation if the function is GELU: only in a dense MLP with a bias.
    has_fused_gelu = name == "gelu_tanh" and model.num_experts is None and not model.disable_bias_linear
    is_fused = device.type == "cuda" and (name == "swiglu" or has_fused_gelu)
    return {
        "gated_linear_unit": is_gated(model),
        "activation_func": F.gelu if is_fused and has_fused_gelu else FUNCTIONS[name],
        "bias_activation_fusion": is_fused,
    }


def activate(config: TransformerConfig, values: Tensor, bias: Tensor | None) -> Tensor:
    """Return the activations of a dense MLP from the outputs of its first layer.

    Args:
        config: Megatron-Core's configuration.
        values: [..., f], or [..., 2 f] if the activation is gated.
        bias: of the first layer.

    Returns:
        [..., f].
    """
    if config.bias_activation_fusion:
        return bias_swiglu_impl(values, bias) if config.gated_linear_unit else bias_gelu_impl(values, bias)
    values = values if bias is None else values + bias
    if config.gated_linear_unit:
        gate, linear = values.chunk(2, dim=-1)
        return config.activation_func(gate) * linear
    return config.activation_func(values)
