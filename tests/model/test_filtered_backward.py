"""Test the filtered backward pass against its definition: branch outputs of unselected tokens are constants."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_slm.config.schema import ModelConfig, ObjectiveConfig
from megatron_slm.model.filtered_backward import FilteredMLP, FilteredQueryLinear, FilteredRowLinear
from megatron_slm.model.specs import layer_spec
from megatron_slm.testing.ranks import run_ranks

LENGTH, BATCH, VOCAB = 12, 2, 64
LLAMA = {
    "group_query_attention": True,
    "num_query_groups": 2,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
}
MODELS: dict[str, dict[str, Any]] = {"gpt2": {"position_embedding_type": "learned_absolute"}, "llama": LLAMA}


def define_filter(chunk: Any, selected: Tensor) -> None:
    """Make the branch outputs of unselected tokens constants; ``selected`` is [s, b] bool."""
    mask = selected.unsqueeze(-1)

    def hook(module: Any, inputs: Any, result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
        output, bias = result
        output = output if bias is None else output + bias
        return torch.where(mask, output, output.detach()), None

    for layer in chunk.decoder.layers:
        layer.self_attention.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


def _gradients(rank: int, world_size: int, settings: dict[str, Any], share: float) -> dict[str, dict[str, Tensor]]:
    """Return the gradients of exact, defined and filtered backward passes in float64."""
    from megatron_slm.model.selected_tokens import BackwardFilter
    from megatron_slm.runtime import process
    from megatron_slm.runtime.groups import ParallelLayout
    from megatron_slm.testing.tiny_gpt import build_tiny_gpt

    groups = process.start(ParallelLayout(), seed=1)
    model = {"num_layers": 3, "init_method_std": 0.3, **settings}
    objective = ObjectiveConfig(slm_cross_entropy="torch")
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator) for _ in range(2))
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    selected = torch.rand(BATCH, LENGTH, generator=generator) < share
    found, states = {}, None
    for name in ("exact", "defined", "filtered"):
        backward_filter = BackwardFilter(groups) if name == "filtered" else None
        chunk = build_tiny_gpt(groups, LENGTH, VOCAB, model, objective=objective, backward_filter=backward_filter)
        states = states or chunk.state_dict()
        chunk.load_state_dict(states)
        for parameter in chunk.parameters():  # biases start at zero, and norms at one
            parameter.data = parameter.data.double()
        if name == "defined":
            define_filter(chunk, selected.t())
        if backward_filter is not None:
            backward_filter.begin_step(1, BATCH)
            backward_filter.enter_forward(0)
        hidden = chunk(tokens, positions, None)
        loss = (hidden.token_losses(labels).loss * selected).sum()
        if backward_filter is not None:
            backward_filter.select(0, selected)
        loss.backward()
        found[name] = {key: value.grad for key, value in chunk.named_parameters()}
    return found


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_gradients_equal_those_of_the_definition(settings: dict[str, Any]) -> None:
    (gradients,) = run_ranks(_gradients, 1, settings, 0.5, initialize=False)
    for name, expected in gradients["defined"].items():
        torch.testing.assert_close(gradients["filtered"][name], expected, rtol=1e-6, atol=1e-9, msg=name)
    differs = [
        name for name, exact in gradients["exact"].items() if not torch.allclose(exact, gradients["defined"][name])
    ]
    assert any("linear_fc1" in name for name in differs), "the definition changes no gradient"


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_gradients_of_all_tokens_are_exact(settings: dict[str, Any]) -> None:
    (gradients,) = run_ranks(_gradients, 1, settings, 2.0, initialize=False)
    for name, expected in gradients["exact"].items():
        assert torch.equal(gradients["filtered"][name], expected), name


def test_no_selected_token_has_no_gradient() -> None:
    (gradients,) = run_ranks(_gradients, 1, LLAMA, -1.0, initialize=False)
    assert all(not gradient.any() for gradient in gradients["filtered"].values())


def test_norms_and_attention_are_those_of_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear layers filter, whichever implementation the other modules have."""
    engine: Any = ModuleType("megatron.core.extensions.transformer_engine")
    engine.TENorm, engine.TEDotProductAttention = (type(name, (), {}) for name in ("Norm", "Attention"))
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    config, backward_filter = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2), object()
    model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, qk_layernorm=True)
    found: Any = layer_spec(model, config, "transformer_engine", None, 0, backward_filter)  # type: ignore[arg-type]
    layer, attention = found.layer_specs[0].submodules, found.layer_specs[0].submodules.self_attention.submodules
    norms = (layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm, attention.k_layernorm)
    assert {*norms, found.layer_norm} == {engine.TENorm} and attention.core_attention is engine.TEDotProductAttention
    assert (attention.linear_qkv.func, attention.linear_proj.module) == (FilteredQueryLinear, FilteredRowLinear)
    given = (attention.linear_qkv.keywords, attention.linear_proj.params, layer.mlp.params)
    assert layer.mlp.module is FilteredMLP and all(each["backward_filter"] is backward_filter for each in given)
