"""Planned memory, compared with the peak of torch's allocations on every rank of runs on CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.config.checks import derive
from megatron_slm.config.flags import parse
from megatron_slm.planning.devices import cpu_device
from megatron_slm.planning.memory import Memory, stage_memory
from megatron_slm.planning.search import Problem
from megatron_slm.testing.memory import run_peaks
from megatron_slm.testing.tiny import launch

MODEL = [
    *("--num-layers", "4", "--hidden-size", "256", "--num-attention-heads", "8", "--seq-length", "256"),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "8000", "--lr", "1e-3", "--num-workers", "0"),
    *("--eval-iters", "0", "--mock-data", "--train-iters", "2", "--micro-batch-size", "2", "--global-batch-size", "8"),
]
SLM = ["--objective", "slm", "--slm-score"]
TP2 = ["--tensor-model-parallel-size", "2"]
LAYOUTS = {
    "TP 1": (1, []),
    "TP 2": (2, TP2),
    "TP 2, sequence parallelism": (2, [*TP2, "--sequence-parallel"]),
    "PP 2": (2, ["--pipeline-model-parallel-size", "2"]),
    "DP 2, distributed optimizer": (2, ["--use-distributed-optimizer"]),
    "CP 2": (2, ["--context-parallel-size", "2"]),
    "recomputation": (
        1,
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    ),
    "logits in chunks, SLM": (1, [*SLM, "token-loss", "--slm-saved-logits-mb", "0"]),
    "all logits": (1, ["--slm-cross-entropy", "torch"]),
    "filtered backward pass": (1, [*SLM, "token-loss", "--slm-backward", "filtered"]),
}


def planned(argv: list[str], ranks: int) -> list[Memory]:
    """Return the planned memory of each pipeline stage."""
    config = derive(parse(argv).config)
    layout = Problem(config, ranks, 8000, cpu_device(1 << 40, ranks)).layout({})
    return [stage_memory(layout, stage) for stage in range(layout.pipeline)]


def assert_close(argv: list[str], ranks: int) -> None:
    peaks, plans = run_peaks(argv, ranks), planned(argv, ranks)
    per_stage = ranks // len(plans)
    for rank, peak in enumerate(peaks):
        plan = plans[rank // per_stage]
        assert plan.total == pytest.approx(peak, rel=0.05), (rank, peak, plan)


def test_memory_of_a_small_run() -> None:
    small = ["--num-layers", "2", "--hidden-size", "128", "--seq-length", "128", "--global-batch-size", "4"]
    assert_close([*MODEL, *small], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_of_a_layout(name: str) -> None:
    ranks, flags = LAYOUTS[name]
    assert_close([*MODEL, *flags], ranks)


@pytest.mark.slow
def test_memory_of_a_co_located_reference_model(tmp_path: Path) -> None:
    launch([*MODEL, "--save", str(tmp_path), "--train-iters", "1"])
    assert_close([*MODEL, *SLM, "excess", "--reference-load", str(tmp_path)], 1)
