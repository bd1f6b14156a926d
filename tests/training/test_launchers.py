"""Test that srun starts one run, and that a failure of any rank prints one message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.runtime import reporting
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import Outcome, captured, command, make_corpus, records
from megatron_slm.training import loop


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("launchers") / "corpus", 1)


def under_srun(rank: int, world_size: int, argv: list[str], changes: dict[str, str]) -> Outcome:
    """Run the trainer with only the variables that srun sets on one node."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ |= {
        "SLURM_JOB_ID": str(os.getppid()),
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NODELIST": "node7",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(world_size),
        **changes,
    }
    return impatient(argv)


def impatient(argv: list[str]) -> Outcome:
    """Run the trainer, whose ranks wait half a second for the message of another rank."""
    reporting.SECONDS_FOR_RANK_0, reporting.SECONDS_FOR_OTHERS = 0.5, 0.5
    return captured(argv)


def test_srun_starts_one_run_that_prints_once(tmp_path: Path, corpus: str) -> None:
    argv = command(corpus, tmp_path / "run", dp=2, train_iters=2)
    first, second = run_ranks(under_srun, 2, argv, {}, initialize=False)
    assert first[0] == 0, first[2]
    assert "2 x CPU over gloo" in first[1] and first[1].count("step 2/2") == 1
    assert second == (0, "", "")
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ({"lr": "fast"}, {}, "--lr must be a number"),
        ({"config": "/nowhere.yaml"}, {}, "/nowhere.yaml"),
        ({"load": "/nowhere", "finetune": True}, {}, "--load /nowhere"),
        ({}, {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, and srun started 2 tasks"),
    ],
)
def test_user_error_under_srun_prints_one_message(
    corpus: str, flags: dict[str, Any], changes: dict[str, str], message: str
) -> None:
    argv = command(corpus, dp=2, **{"train_iters": 1, **flags})
    results = run_ranks(under_srun, 2, argv, changes, initialize=False)
    assert [code for code, _, _ in results] == [2, 2]
    assert "".join(errors for _, _, errors in results).count(message) == 1, results
    assert not results[1][2]


def fail_on_rank_1(rank: int, world_size: int, argv: list[str], error: Exception) -> Outcome:
    """Run the trainer; rank 1 fails before its second step while rank 0 waits in a collective."""
    whole_step = loop.one_step

    def step(run: Any, stream: Any, observer: Any) -> Any:
        if rank == 1 and run.progress.step == 1:
            raise error
        return whole_step(run, stream, observer)

    loop.one_step = step
    return impatient(argv)


@pytest.mark.parametrize(("error", "code"), [(ConfigError("no room"), 2), (ValueError("a fault"), 1)])
def test_failure_of_one_rank_prints_one_message(corpus: str, error: Exception, code: int) -> None:
    argv = command(corpus, dp=2, train_iters=2)
    first, second = run_ranks(fail_on_rank_1, 2, argv, error, initialize=False)
    assert first[0] == 1 and not first[2]
    assert second[0] == code
    assert second[2].count(str(error)) == 1 and "error on rank 1" in second[2]
    assert ("Traceback" in second[2]) == (code == 1)


def test_lost_peer_is_reported_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")

    assert reporting.run_command(action) == 1
    errors = capsys.readouterr().err
    assert "another rank exited without a report" in errors and "Traceback" not in errors


def test_interrupt_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise KeyboardInterrupt

    assert reporting.run_command(action) == 130
    assert capsys.readouterr().err == "interrupted\n"
