"""What a run writes: lines that fit, JSONL that survives a resume, TensorBoard that can be read back, sizes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_slm.config.schema import ModelConfig, ObjectiveConfig
from megatron_slm.model.size import forward_flops_per_token, parameter_count
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.training.metrics import JsonlSink, StepMetrics, TensorBoardSink, TokenSums, losses_of
from megatron_slm.training.step import selection_ratio


def test_one_line_fits_in_160_columns() -> None:
    metrics = StepMetrics(
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
    )
    assert len(metrics.line(1_000_000)) <= 160


def test_losses_are_ratios_of_sums() -> None:
    values = torch.tensor([6.0, 3, 20, 5, 1.0, 2], dtype=torch.float64)
    figures = losses_of(TokenSums(values, torch.tensor(-1)))
    assert (figures["loss"], figures["loss_all"], figures["loss_unselected"]) == (2.0, 4.0, 7.0)
    assert (figures["share_selected"], figures["threshold"], figures["selection"]) == (0.6, 0.5, "f" * 16)


def test_jsonl_drops_steps_that_run_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    first = JsonlSink(path, 0)
    for step in range(1, 6):
        first.write({"kind": "train", "step": step})
    first.file.write('{"kind": "tr')  # killed while it wrote
    first.close()
    second = JsonlSink(path, 3)
    second.write({"kind": "train", "step": 4})
    second.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_metrics_that_cannot_be_written_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--slm-metrics-file .*cannot be written"):
        JsonlSink(tmp_path / "file" / "metrics.jsonl", 0)
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    sink.close()
    with contextlib.suppress(OSError), Path("/dev/full").open("w", buffering=1) as full:  # closing it fails too
        sink.file = full
        with pytest.raises(ConfigError, match=r"--slm-metrics-file .*No space left on device"):
            sink.write({"kind": "train", "step": 1})


def test_tensorboard_is_read_back(tmp_path: Path) -> None:
    sink = TensorBoardSink(str(tmp_path), 0)
    sink.write({"kind": "train", "step": 1, "loss": 2.5, "selection": "ff", "mfu": None})
    sink.write({"kind": "eval", "step": 1, "set": "clean", "loss": 3.5})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/clean/loss", "train/loss"]
    assert events.Scalars("eval/clean/loss")[0].value == 3.5


def test_ratio_is_warmed_down() -> None:
    own = ObjectiveConfig(slm_selection_ratio=0.6, slm_selection_ratio_start=1.0, slm_selection_ratio_warmup_iters=4)
    assert [selection_ratio(own, step) for step in range(6)] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.6])
    assert selection_ratio(ObjectiveConfig(), 0) == 0.6


def test_sizes_of_a_known_model() -> None:
    """TinyLlama-1.1B: 1,100,048,384 parameters."""
    tiny_llama = ModelConfig(
        num_layers=22,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_attention_heads=32,
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
