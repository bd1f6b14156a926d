"""Test step metrics, console lines, and model sizes."""

from __future__ import annotations

import pytest
import torch

from megatron_slm.config.schema import ModelConfig, ObjectiveConfig
from megatron_slm.model.size import forward_flops_per_token, matrix_parameters, parameter_count
from megatron_slm.training.curriculum import selection_ratio
from megatron_slm.training.metrics import StepMetrics, TokenSums, step_losses

LONGEST = StepMetrics(
    step=1_000_000,
    tokens=10**12,
    loss=12.3456,
    loss_all=12.3456,
    loss_unselected=12.3456,
    share_selected=0.6,
    threshold=-12.345,
    selection="0" * 16,
    grad_norm=123.456,
    lr=1e-4,
    seconds=1.0,
    tokens_per_second=123_456_789.0,
    tflops=512.3,
    mfu=0.5123,
    seconds_left=86400 * 99,
    global_batch_size=4096,
    memory=3 * 2**29,
    memory_peak=2**31,
    memory_reserved=2**32,
)


@pytest.mark.parametrize("width", [160, 100, 80, 60, 40])
def test_line_fits_the_width(width: int) -> None:
    line = LONGEST.line(1_000_000, width)
    assert len(line) <= width
    assert line.startswith("step 1000000/1000000 | loss 12.3456")
    assert (" left" in line) == (width >= 60)


def test_line_without_width_has_all_metrics() -> None:
    line = LONGEST.line(1_000_000)
    assert all(name in line for name in ("all", "rest", "selected", "τ", "norm", "lr", "tok/s", "TFLOP/s", "MFU"))
    assert " batch 4096 " in line
    assert " memory 1.5 GiB (peak 2.0 GiB, reserved 4.0 GiB) |" in line


def test_losses_are_ratios_of_sums() -> None:
    values = torch.tensor([6.0, 3, 20, 5, 1.0, 2, 0], dtype=torch.float64)
    figures = step_losses(TokenSums(values, torch.tensor(-1)))
    assert (figures["loss"], figures["loss_all"], figures["loss_unselected"]) == (2.0, 4.0, 7.0)
    assert (figures["share_selected"], figures["threshold"], figures["selection"]) == (0.6, 0.5, "f" * 16)


def test_ratio_warm_up() -> None:
    settings = ObjectiveConfig(
        slm_selection_ratio=0.6, slm_selection_ratio_start=1.0, slm_selection_ratio_warmup_iters=4
    )
    assert [selection_ratio(settings, step, 0) for step in range(6)] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.6])
    assert selection_ratio(ObjectiveConfig(), 0, 0) == 0.6


def test_levels_of_the_ratio_begin_at_their_step() -> None:
    """29 / 100 * 100 is below 29 in floating-point numbers."""
    settings = ObjectiveConfig(
        slm_selection_ratio=1.0,
        slm_selection_ratio_start=0.5,
        slm_selection_ratio_warmup_iters=100,
        slm_selection_ratio_style="steps",
        slm_selection_ratio_levels=100,
    )
    for step in range(101):
        assert selection_ratio(settings, step, 0) == pytest.approx(0.5 + step / 200, abs=1e-12)


@pytest.mark.parametrize(
    ("style", "ratios"),
    [
        ("linear", [1.0, 0.9, 0.8, 0.7, 0.6, 0.6]),
        ("cosine", [1.0, 0.941421, 0.8, 0.658579, 0.6, 0.6]),
        ("steps", [1.0, 1.0, 0.8, 0.8, 0.6, 0.6]),
    ],
)
def test_ratio_curriculum_over_tokens(style: str, ratios: list[float]) -> None:
    settings = ObjectiveConfig(
        slm_selection_ratio_start=1.0,
        slm_selection_ratio_warmup_tokens=400,
        slm_selection_ratio_style=style,
        slm_selection_ratio_levels=2,
    )
    assert [selection_ratio(settings, 9, tokens) for tokens in range(0, 600, 100)] == pytest.approx(ratios)


def test_sizes_of_experts() -> None:
    """Mixtral-8x7B: 46.7 billion parameters, of which 12.9 billion are active."""
    mixtral = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        moe_ffn_hidden_size=14336,
        num_attention_heads=32,
        kv_channels=128,
        group_query_attention=True,
        num_query_groups=8,
        seq_length=4096,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
        num_experts=8,
        moe_router_topk=2,
    )
    assert parameter_count(mixtral, 32000) == 46_702_792_704
    assert matrix_parameters(mixtral) + 2 * 32000 * 4096 == pytest.approx(12.88e9, rel=1e-3)


def test_size_of_tinyllama() -> None:
    """TinyLlama-1.1B: 1,100,048,384 parameters."""
    tiny_llama = ModelConfig(
        num_layers=22,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_attention_heads=32,
        kv_channels=64,
        group_query_attention=True,
        num_query_groups=4,
        seq_length=2048,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    )
    assert parameter_count(tiny_llama, 32000) == 1_100_048_384
    matrices = 1_100_048_384 - 32000 * 2048 - 45 * 2048
    assert forward_flops_per_token(tiny_llama, 32000) == 2 * matrices + 2 * 2048 * 2048 * 22
