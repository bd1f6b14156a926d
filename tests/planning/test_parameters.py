"""Parameters of a rank, compared with the count of the complete model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_slm.config.schema import ModelConfig
from megatron_slm.model.size import parameter_count
from megatron_slm.planning.efficiencies import LLAMA3_8B, MEASUREMENTS, QWEN3_30B
from megatron_slm.planning.layout import Layout
from megatron_slm.planning.parameters import rank_parameters
from megatron_slm.planning.step_time import row_layout

GPT2 = replace(LLAMA3_8B, normalization="LayerNorm", swiglu=False, disable_bias_linear=False)
MODELS = {
    "llama": LLAMA3_8B,
    "layer norm, biases, learned positions": replace(GPT2, position_embedding_type="learned_absolute"),
    "qk norm, biases of queries": replace(LLAMA3_8B, qk_layernorm=True, add_qkv_bias=True),
    "experts": QWEN3_30B,
    "multi-token prediction": replace(LLAMA3_8B, mtp_num_layers=2),
    "tied": replace(LLAMA3_8B, untie_embeddings_and_output_weights=False),
}


def make_layout(model: ModelConfig, **parallel: int) -> Layout:
    base = row_layout(MEASUREMENTS[0])
    sizes = {f"{name}_model_parallel_size": size for name, size in parallel.items()}
    config = replace(base.config, model=model, parallel=replace(base.config.parallel, **sizes))
    return replace(base, config=config, world_size=64, vocab_size=128256)


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_holds_all_parameters(name: str) -> None:
    layout = make_layout(MODELS[name])
    assert rank_parameters(layout, 0).total == parameter_count(MODELS[name], layout.padded_vocab)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "multi-token prediction"])
def test_stages_share_the_parameters(name: str) -> None:
    layout = make_layout(MODELS[name], pipeline=4)
    total = sum(rank_parameters(layout, stage).total for stage in range(4))
    twice = 0 if MODELS[name].untie_embeddings_and_output_weights else layout.padded_vocab * 4096
    assert total == parameter_count(MODELS[name], layout.padded_vocab) + twice


def test_tensor_parallel_ranks_hold_all_norms_and_share_the_rest() -> None:
    layout = make_layout(LLAMA3_8B, tensor=4)
    norms = (2 * 32 + 1) * 4096
    total = parameter_count(LLAMA3_8B, layout.padded_vocab)
    assert rank_parameters(layout, 0).total == (total - norms) // 4 + norms


def test_expert_parallel_ranks_share_the_experts() -> None:
    alone, shared = (rank_parameters(make_layout(QWEN3_30B, expert=size), 0) for size in (1, 16))
    assert (shared.dense, shared.experts) == (alone.dense, alone.experts // 16)
