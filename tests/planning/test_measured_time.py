"""Planned step times, compared with the CPU time of steps of one process on one thread."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import pytest

from megatron_slm.config.checks import derive
from megatron_slm.config.flags import parse
from megatron_slm.planning import cpu_rates
from megatron_slm.planning.cpu_rates import MeasuredRates
from megatron_slm.planning.cpu_time import cpu_step_time
from megatron_slm.planning.devices import cpu_device
from megatron_slm.planning.search import Problem
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import captured

MODEL = [
    *("--num-layers", "2", "--hidden-size", "512", "--num-attention-heads", "8", "--seq-length", "512"),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "8000", "--lr", "1e-3", "--num-workers", "0"),
    *("--eval-iters", "0", "--mock-data", "--micro-batch-size", "2", "--global-batch-size", "4"),
]
SLM = ["--objective", "slm", "--slm-selection-ratio", "0.6"]
RUNS: dict[str, list[str]] = {
    "CLM": [],
    "SLM, filtered backward pass": [*SLM, "--slm-score", "token-loss", "--slm-backward", "filtered"],
    "SLM, co-located reference model": [*SLM, "--reference-load", "REFERENCE"],
    "SLM, exact global batch": [*SLM, "--slm-score", "token-loss", "--slm-scope", "global-batch"],
}
STEPS = 5


def measured_and_planned(rank: int, world_size: int, runs: list[list[str]]) -> list[tuple[float, float]]:
    """Return the median CPU time of the steps of each run, and the planned time, measured in turn."""
    from megatron_slm.training import loop

    found: list[tuple[float, float]] = []
    for argv in runs:
        times: list[float] = []
        step = loop.train_step

        def timed(*arguments: Any, step: Any = step, times: list[float] = times, **options: Any) -> Any:
            start = time.process_time()
            result = step(*arguments, **options)
            times.append(time.process_time() - start)
            return result

        with mock.patch.object(loop, "train_step", timed):
            outcome = captured([*argv, "--train-iters", str(STEPS)])
        assert outcome.code == 0, outcome.errors
        layout = Problem(derive(parse([*argv, "--train-iters", "4"]).config), 1, 8000, cpu_device(1 << 40, 1)).layout(
            {}
        )
        for rate in vars(cpu_rates).values():  # measured again, since the load of the machine changes
            getattr(rate, "cache_clear", lambda: None)()
        found.append((median(times), cpu_step_time(layout, MeasuredRates()).total))
    return found


@pytest.mark.slow
def test_planned_steps_take_the_measured_time(tmp_path: Path) -> None:
    save = ["--save", str(tmp_path), "--train-iters", "1"]
    ((first, *_),) = run_ranks(_train, 1, [*MODEL, *save], initialize=False, timeout=600)
    assert first == 0
    runs = [[*MODEL, *(str(tmp_path) if word == "REFERENCE" else word for word in flags)] for flags in RUNS.values()]
    (times,) = run_ranks(measured_and_planned, 1, runs, initialize=False, timeout=1200)
    errors = {name: planned / measured - 1 for name, (measured, planned) in zip(RUNS, times, strict=True)}
    print(errors, times)  # shown if the test fails
    assert max(map(abs, errors.values())) < 0.15, (errors, times)


def _train(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    outcome = captured(argv)
    return outcome.code, outcome.errors
