"""Buffers of --tp-comm-overlap, its settings file, and parts that need Transformer Engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_slm.checkpoint.huggingface import load
from megatron_slm.config.flags import parse
from megatron_slm.config.schema import RunConfig
from megatron_slm.reference.replica import _check_shape
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.training import communication_overlap
from megatron_slm.training.communication_overlap import overlap_settings, start_overlap
from megatron_slm.training.preflight import check_precision

MODEL = "--num-layers 4 --hidden-size 128 --ffn-hidden-size 512 --num-attention-heads 4 --seq-length 256 "
MODEL += "--micro-batch-size 2 --bf16 "
OVERLAP = "--tp-comm-overlap --tensor-model-parallel-size 2 --context-parallel-size 2 "
CPU = torch.device("cpu")


def settings(flags: str = "") -> RunConfig:
    return parse(f"{MODEL} {flags}".split()).config


@pytest.mark.parametrize(
    ("flags", "fp8", "high_precision"),
    [
        ("", False, True),
        ("--fp8-format hybrid", True, False),
        ("--fp8-format hybrid --first-last-layers-bf16", True, True),
        (
            "--fp8-format hybrid --first-last-layers-bf16 --num-layers-at-start-in-bf16 0 "
            "--num-layers-at-end-in-bf16 0",
            True,
            False,
        ),
    ],
)
def test_buffers(monkeypatch: pytest.MonkeyPatch, flags: str, fp8: bool, high_precision: bool) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(communication_overlap, "initialize_user_buffers", lambda **options: calls.append(options))
    start_overlap(settings(flags))
    assert not calls
    start_overlap(settings(OVERLAP + flags))
    assert calls == [
        {
            "shape": (256, 128),
            "dtype": torch.bfloat16,
            "tensor_parallel_size": 2,
            "settings": {},
            "uses_fp8": fp8,
            "uses_high_precision": high_precision,
            "bootstrap_backend": "nccl",
        }
    ]


def test_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "overlap.yaml"
    path.write_text("qkv_fprop: {method: ring_exchange, num_sm: 1}\n", encoding="utf-8")
    assert overlap_settings(str(path)) == {"qkv_fprop": {"method": "ring_exchange", "num_sm": 1}}
    for content in (b"qkv_fprop: ring", b"- a", b"", b"a: [", b"\xff\xfe\xfa"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"--tp-comm-overlap-cfg .*overlap.yaml: the file"):
            overlap_settings(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        overlap_settings(str(tmp_path))


@pytest.mark.parametrize("flag", ["--use-precision-aware-optimizer", "--tp-comm-overlap"])
def test_parts_of_transformer_engine_are_refused_without_it(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} needs Transformer Engine: "):
        check_precision(settings(flag), "local", CPU)


@pytest.mark.parametrize("flags", ["--fp8-format hybrid", "--reference-fp8"])
def test_fp8_is_refused_on_a_cpu(flags: str) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        check_precision(settings(flags), "local", CPU)


def test_reference_model_in_fp8_needs_aligned_sizes() -> None:
    """The reference model has its own sizes, and the sequence length of the run."""
    for reference, is_refused in (("--ffn-hidden-size 520", True), ("--seq-length 264", False)):
        model = settings(reference)
        if not is_refused:
            _check_shape(model, settings("--reference-fp8"), "--reference-load rm")
            continue
        _check_shape(model, settings(), "--reference-load rm")
        with pytest.raises(
            ConfigError, match=r"--reference-load rm with --reference-fp8: .*--ffn-hidden-size .* = 520"
        ):
            _check_shape(model, settings("--reference-fp8"), "--reference-load rm")


def test_published_model_is_not_loaded_into_fp8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = SimpleNamespace(flag="--reference-load", directory=Path("published"))
    load._check_precision([torch.nn.Linear(2, 2)], source)
    monkeypatch.setattr(load, "is_float8tensor", lambda parameter: True)
    with pytest.raises(ConfigError, match=r"--reference-load: .* Convert published with tools/convert_checkpoint.py"):
        load._check_precision([torch.nn.Linear(2, 2)], source)
