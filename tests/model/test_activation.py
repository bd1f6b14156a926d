"""Test that the MLP activation is the same function on every device, fused or not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor

from megatron_slm.config.activation import activation_name
from megatron_slm.config.checks import resolve
from megatron_slm.config.flags import parse
from megatron_slm.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from megatron_slm.model.activation import FUNCTIONS, activation_settings, gelu_tanh
from megatron_slm.model.gpt import transformer_config
from megatron_slm.runtime.errors import ConfigError

DEVICES = ("cpu", "cuda")
GATED = ("swiglu", "geglu", "geglu_tanh")
VALUES = torch.linspace(-6, 6, 601)


def megatron_config(device: str, **model: Any) -> Any:
    """Return Megatron-Core's configuration for a device, which need not be present."""
    settings = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16, **model)
    groups: Any = SimpleNamespace(device=torch.device(device))
    return transformer_config(settings, ParallelConfig(), TrainingConfig(), groups, "local", params_dtype="fp32")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fields(name: str, bias: bool, device: str) -> None:
    """Megatron-Core accepts every combination, and fusion does not change the function."""
    config = megatron_config(device, activation=name, disable_bias_linear=not bias)
    assert config.gated_linear_unit == (name in GATED) and config.add_bias_linear == bias
    fuses = device == "cuda" and (name == "swiglu" or (name == "gelu_tanh" and bias))
    assert config.bias_activation_fusion == fuses
    # Megatron-Core recognizes its fused tanh approximation by the exact function.
    assert config.activation_func is (F.gelu if fuses and name == "gelu_tanh" else FUNCTIONS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fields_with_experts(name: str, device: str) -> None:
    """Experts fuse only SwiGLU, Megatron-Core's only fused activation with routing weights."""
    config = megatron_config(device, activation=name, num_experts=2)
    assert config.bias_activation_fusion == (device == "cuda" and name == "swiglu")
    assert config.activation_func is FUNCTIONS[name]


def gradient(function: Any, values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.clone().requires_grad_()
    result = function(values)
    return result.detach(), torch.autograd.grad(result.square().sum(), values)[0]


@pytest.mark.parametrize("with_bias", [True, False])
def test_fused_and_unfused_functions_agree(with_bias: bool) -> None:
    values = torch.stack((VALUES, VALUES.flip(0))).t().contiguous()
    bias = torch.tensor([0.25, -0.5])
    with torch.compiler.set_stance("force_eager"):
        fused = gradient(lambda x: bias_swiglu_impl(x, bias if with_bias else None), values)
        added = bias if with_bias else 0.0
        plain = gradient(lambda x: F.silu((x + added)[:, :1]) * (x + added)[:, 1:], values)
        pairs = [(fused, plain)]
        if with_bias:
            pairs.append(
                (gradient(lambda x: bias_gelu_impl(x, bias), values), gradient(lambda x: gelu_tanh(x + bias), values))
            )
    for one, other in pairs:
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert float((gelu_tanh(VALUES) - F.gelu(VALUES)).abs().max()) > 1e-4, "the comparison sees no difference"


def test_functions() -> None:
    exact = VALUES.double()
    cdf = 0.5 * (1 + torch.erf(exact / 2**0.5))
    inner = (2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3)
    wanted = {
        "gelu": exact * cdf,
        "geglu": exact * cdf,
        **dict.fromkeys(("gelu_tanh", "geglu_tanh"), 0.5 * exact * (1 + torch.tanh(inner))),
        "swiglu": exact / (1 + (-exact).exp()),
        "squared_relu": exact.clamp(min=0) ** 2,
    }
    for name, function in FUNCTIONS.items():
        torch.testing.assert_close(function(VALUES).double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)


FLAGS = {
    "": "gelu",
    "--swiglu": "swiglu",
    "--no-swiglu": "gelu",
    "--squared-relu": "squared_relu",
    "--openai-gelu": "gelu_tanh",
    "--activation geglu": "geglu",
    "--activation geglu_tanh": "geglu_tanh",
    "--swiglu --activation swiglu": "swiglu",
}
NEEDED = (
    "--num-layers 2 --hidden-size 48 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --train-iters 1 "
    "--lr 1e-3 --tokenizer-type ByteTokenizer --data-path corpus"
)


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags: str) -> None:
    config = resolve(parse([*NEEDED.split(), *flags.split()]).config, 1)
    assert activation_name(config.model) == FLAGS[flags]
    assert config.model.ffn_hidden_size == (128 if FLAGS[flags] in GATED else 192)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--swiglu --activation geglu", "--swiglu contradicts the activation geglu"),
        ("--swiglu --squared-relu", "--swiglu contradicts the activation squared_relu"),
        ("--squared-relu --activation gelu", "--squared-relu contradicts --activation gelu"),
        ("--quick-geglu", "Use --activation geglu"),
        ("--activation relu", "--activation must be one of gelu, gelu_tanh, swiglu, geglu, geglu_tanh, squared_relu"),
    ],
)
def test_contradictions(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(parse([*NEEDED.split(), *flags.split()]).config, 1)


def test_configurations_of_earlier_versions_keep_their_activation() -> None:
    """They do not contain ``activation``, and were trained with exact GELU on a CPU."""
    for swiglu, name in ((True, "swiglu"), (False, "gelu")):
        for device in DEVICES:
            settings = activation_settings(ModelConfig(swiglu=swiglu), torch.device(device))
            assert settings["activation_func"] is FUNCTIONS[name]
