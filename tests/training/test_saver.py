"""Test asynchronous saves: equal to synchronous ones, completed at errors and signals, reported if they fail."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.serialization import load_plain_tensors
from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

from megatron_slm.checkpoint import writing
from megatron_slm.checkpoint.source import open_source
from megatron_slm.testing.ranks import run_ranks, shared_process_group
from megatron_slm.testing.tiny import Outcome, captured, command, losses, make_corpus
from megatron_slm.training import loop

TRACKER = "latest_checkpointed_iteration.txt"
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("saver") / "corpus", 1)


@contextlib.contextmanager
def slow_writes(seconds: float, *, forked_only: bool = True) -> Iterator[None]:
    """Delay the writing of files, so that training goes on meanwhile."""
    write, parent = writing.write_files, os.getpid()

    def delayed(*arguments: Any) -> Any:
        if os.getpid() != parent or not forked_only:
            time.sleep(seconds)
        return write(*arguments)

    with mock.patch.object(writing, "write_files", delayed):
        yield


def _train_both(rank: int, world_size: int, commands: list[list[str]]) -> list[Outcome]:
    """The ranks finish writing at different times, further apart than rank 0 waits for their records."""
    limit = mock.patch("megatron_slm.training.saver.SECONDS_FOR_RECORDS", 0.1)
    with slow_writes(0.4 + 0.4 * rank), limit, shared_process_group():
        return [captured(argv) for argv in commands]


def test_asynchronous_checkpoints_equal_synchronous_ones(tmp_path: Path, corpus: str) -> None:
    """Weights change while the files are written; two saves overlap; parameters are gathered with overlap."""
    flags = {"dp": 2, "train_iters": 3, "save_interval": 1, "eval_iters": 0, "keep_last": 2}
    commands = [
        [*command(corpus, tmp_path / name, **flags), *OVERLAP, *(["--async-save"] if name == "async" else [])]
        for name in ("sync", "async")
    ]
    outcomes = run_ranks(_train_both, 2, commands, initialize=False)[0]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert "iter_0000001 in the background" in outcomes[1].output and "saved " in outcomes[1].output
    assert losses(tmp_path / "async") == losses(tmp_path / "sync")
    for name in ("sync", "async"):
        steps = sorted(path.name for path in (tmp_path / name).glob("iter_*"))
        assert steps == [f"iter_000000{step}" for step in (2, 3)]
        assert (tmp_path / name / TRACKER).read_text() == "3\n"
    (differences,) = run_ranks(_differing, 1, tmp_path / "sync", tmp_path / "async")
    assert not differences


def _differing(rank: int, world_size: int, one: Path, other: Path) -> list[str]:
    """Verify each checkpoint, and return the differing files and tensors."""
    found = []
    for step in (2, 3):
        directories = [open_source(str(run), step, "--load").directory for run in (one, other)]
        names, others = (sorted(path.name for path in directory.iterdir()) for directory in directories)
        assert names == others
        tensors, compared = (load_plain_tensors(str(directory)) for directory in directories)
        assert tensors.keys() == compared.keys() and any("exp_avg" in key for key in tensors)
        pairs = [(key, value, compared[key]) for key, value in tensors.items() if torch.is_tensor(value)]
        found += [key for key, value, other_value in pairs if not torch.equal(value, other_value)]
    return found


def _fail(message: str) -> Any:
    """Return a replacement of the training step, whose third call fails."""
    step, calls = loop.one_step, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError(message)
        return step(*arguments)

    return mock.patch.object(loop, "one_step", failing)


def _error_during_save(rank: int, world_size: int, argv: list[str]) -> Outcome:
    """Rank 1 fails alone while both ranks write."""
    with slow_writes(1.0), _fail("injected") if rank else contextlib.nullcontext():
        return captured(argv)


def test_save_in_progress_is_completed_after_an_error_of_one_rank(tmp_path: Path, corpus: str) -> None:
    run = tmp_path / "run"
    argv = command(corpus, run, dp=2, train_iters=5, save_interval=2, eval_iters=0, async_save=True)
    first, second = run_ranks(_error_during_save, 2, argv, initialize=False)
    assert second.code == 1 and "injected" in second.errors, second
    assert first.code == 1 and f"saved {run}/iter_0000002" in first.output, first
    assert open_source(str(run), None, "--load").directory.name == "iter_0000002"
    assert not list(run.glob("*.partial"))


def _signalled(rank: int, world_size: int, runs: dict[str, list[str]]) -> dict[str, Outcome]:
    """Stop runs while files are written: by a signal, by the time limit; and fail saves."""
    outcomes = {}
    step, calls = loop.one_step, []

    def signalling(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    with slow_writes(0.5), mock.patch.object(loop, "one_step", signalling):
        outcomes["signal"] = captured(runs["signal"])
    with slow_writes(0.5), mock.patch.object(loop.StopDecision, "_is_overdue", lambda stop: stop_after_two(stop)):
        outcomes["limit"] = captured(runs["limit"])
    with slow_writes(0.2), mock.patch.object(writing, "_write_bucket", _full_disk):
        outcomes["full"] = captured(runs["full"])
    with (
        mock.patch.object(writing, "write_files", lambda *_: os.kill(os.getpid(), signal.SIGKILL)),
        mock.patch("megatron_slm.training.saver.SECONDS_FOR_RECORDS", 0.1),
    ):
        outcomes["killed"] = captured(runs["killed"])
    with mock.patch.object(TemporalAsyncCaller, "schedule_async_call", _no_process):
        outcomes["unforked"] = captured(runs["unforked"])
    return outcomes


def stop_after_two(stop: Any) -> bool:
    stop.calls = getattr(stop, "calls", 0) + 1
    return stop.calls > 2


def _full_disk(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def _no_process(*_: Any) -> Any:
    raise OSError(12, "Cannot allocate memory")


def test_stops_and_failures_during_a_save(tmp_path: Path, corpus: str) -> None:
    def argv(name: str, **flags: Any) -> list[str]:
        return command(corpus, tmp_path / name, train_iters=6, save_interval=2, eval_iters=0, async_save=True, **flags)

    flags = {"limit": {"exit_duration_in_mins": 100}}
    names = ("signal", "limit", "full", "killed", "unforked")
    (outcomes,) = run_ranks(
        _signalled, 1, {name: argv(name, **flags.get(name, {})) for name in names}, initialize=False
    )
    assert [outcomes[name].code for name in names] == [0, 0, 2, 2, 2], outcomes
    assert sorted(path.name for path in (tmp_path / "signal").glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert sorted(path.name for path in (tmp_path / "limit").glob("iter_*")) == ["iter_0000002"]
    assert "--exit-duration-in-mins" in outcomes["limit"].output
    reasons = {
        "full": "No space left on device",
        "killed": "ended without a result",
        "unforked": "could not be started: Cannot allocate memory",
    }
    for name, reason in reasons.items():
        errors = outcomes[name].errors
        assert "checkpoint of step 2 could not be written" in errors and reason in errors, errors
        assert "Traceback" not in errors and not list((tmp_path / name).glob("iter_*")), errors
    for name, step in (("signal", 3), ("limit", 2)):
        assert open_source(str(tmp_path / name), None, "--load").directory.name == f"iter_000000{step}"
