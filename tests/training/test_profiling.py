"""Profiles of steps, the flight recorder, manual garbage collection, and memory in log lines and metrics."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.tiny import command, make_corpus, records, run_each
from megatron_slm.training import flight_recorder, profiling
from megatron_slm.training.garbage import ManualCollection
from megatron_slm.training.preflight import check_diagnostics
from megatron_slm.training.profiling import StepProfiler

CPU = torch.device("cpu")
TORCH = {"profile": True, "use_pytorch_profiler": True}


def configured(**settings: Any) -> RunConfig:
    return with_settings(RunConfig(), settings)


def profiled(steps: range, console: Console, *, rank: int = 0, **settings: Any) -> None:
    """Run a profiler over steps that multiply matrices."""
    groups: Any = SimpleNamespace(rank=rank)
    profiler = StepProfiler(configured(**TORCH, **settings), groups, console)
    for step in steps:
        profiler.before_step(step)
        torch.ones(2, 2).mm(torch.ones(2, 2))
        profiler.after_step(step + 1)
    profiler.close()


def operations(path: Path) -> int:
    """Return the number of matrix products in a Chrome trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*.json.gz"))


def test_a_run_writes_profile_memory_and_no_garbage(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", 1, documents=20)
    argv = command(str(tmp_path / "corpus_text_document"), tmp_path / "run", train_iters=3, num_layers=1)
    argv += ["--profile", "--use-pytorch-profiler", "--profile-step-start", "1", "--profile-step-end", "2"]
    (outcome,) = run_each([*argv, "--manual-gc", "--manual-gc-interval", "2", "--eval-iters", "0"])
    assert outcome.code == 0, outcome.errors
    path = tmp_path / "run" / "torch_profile" / "rank-0-steps-2-2.json.gz"
    assert operations(path) > 0 and f"profile: {path}" in outcome.output.replace("\n", "")
    assert all(10**7 < record["memory"] <= record["memory_peak"] for record in records(tmp_path / "run"))


def test_profiled_steps_and_ranks(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    profiled(range(4), console, save=str(tmp_path / "a"), profile_step_start=1, profile_step_end=3)
    assert names(tmp_path / "a") == ["rank-0-steps-2-3.json.gz"]
    assert operations(tmp_path / "a" / profiling.DIRECTORY / "rank-0-steps-2-3.json.gz") == 2
    profiled(
        range(2, 9), console, rank=3, save=str(tmp_path / "b"), profile_step_start=1, profile_step_end=5
    )  # resumed
    profiled(range(2), console, rank=4, save=str(tmp_path / "b"), profile_step_start=1, profile_step_end=5)  # stopped
    profiled(range(5, 7), console, save=str(tmp_path / "b"), profile_step_start=1, profile_step_end=5)  # already over
    profiled(range(3), console, save=str(tmp_path / "b"), profile_step_start=0, profile_step_end=5, profile_ranks=[1])
    assert names(tmp_path / "b") == ["rank-3-steps-3-5.json.gz", "rank-4-steps-2-2.json.gz"]


def test_run_that_resumes_after_the_profile_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiled(range(12, 14), Console(file=io.StringIO()), save=str(tmp_path))
    assert capsys.readouterr().err.count("no step is profiled: the run resumes after step 12") == 1


def test_an_unwritable_profile_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / profiling.DIRECTORY).touch()
    profiled(range(2), Console(file=io.StringIO()), save=str(tmp_path), profile_step_start=0, profile_step_end=1)
    assert "--use-pytorch-profiler: " in capsys.readouterr().err


def test_profilers_of_gpus_are_refused_on_a_cpu() -> None:
    check_diagnostics(configured(**TORCH), CPU)
    for settings in ({"profile": True}, {"record_memory_history": True}):
        with pytest.raises(ConfigError, match="needs a GPU"):
            check_diagnostics(configured(**settings), CPU)


def test_flight_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in flight_recorder.variables(configured(save="run")):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    flight_recorder.record_collectives(configured(save="run", distributed_backend="gloo"))
    assert "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")  # has precedence
    save = tmp_path / "run"
    config = configured(save=str(save), distributed_backend="nccl", flight_recorder_include_stack_trace=True)
    flight_recorder.record_collectives(config)
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_INCLUDE_STACK_TRACE"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(save / "flight_recorder" / "rank_")
    flight_recorder.make_dump_directory(config)
    assert (save / "flight_recorder").is_dir()
    for without in ({}, {"save": "run", "skip_train": True}, {"save": "run", "replay_step": 3}):
        assert flight_recorder.dump_prefix(configured(**without)) is None
    given = configured(save=str(save), flight_recorder_dump_path=str(tmp_path))
    assert flight_recorder.dump_prefix(given) == str(tmp_path / "_dump_")


def test_manual_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[bool] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(gc.isenabled()))
    collection = ManualCollection(configured(manual_gc=True, manual_gc_interval=2).diagnostics)
    with pytest.raises(ValueError, match="stop"), collection.replacing_automatic():
        for step in (1, 2, 3, 4):
            collection.after_step(step)
        with collection.around_evaluation():
            assert len(collected) == 4
        raise ValueError("stop")
    assert collected == [False] * 5 and gc.isenabled()
    without = ManualCollection(configured(manual_gc=True, manual_gc_eval=False).diagnostics)
    with without.around_evaluation():
        without.after_step(2)
    automatic = ManualCollection(RunConfig().diagnostics)
    with automatic.replacing_automatic(), automatic.around_evaluation():
        automatic.after_step(2)
        assert gc.isenabled()
    assert len(collected) == 5
