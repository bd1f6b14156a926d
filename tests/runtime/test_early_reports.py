"""Errors before the process group exists: one message per distinct error over all ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_slm.cli import pretrain, score_corpus
from megatron_slm.runtime import early_reports
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import Main, Outcome, captured

ROOT = Path(__file__).parents[2]
PRETRAIN = ["-m", "megatron_slm.pretrain"]
SCORE = ["--reference-load=x", "--data-path=x", "--reference-scores=rm"]
BAD = ["--lr", "fast"]
MESSAGE = "--lr must be a number"


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    yield free


def launcher_variables() -> list[str]:
    """Return the names of all environment variables that a launcher may have set."""
    prefixes = ("RANK", "LOCAL_", "WORLD_", "MASTER_", "SLURM_", "TORCHELASTIC_", "GROUP_")
    return [name for name in os.environ if name.startswith(prefixes)]


def start(arguments: list[str], **variables: object) -> subprocess.Popen[str]:
    """Start a command with the given launcher variables only."""
    env = {name: value for name, value in os.environ.items() if name not in launcher_variables()}
    env |= {"PYTHONPATH": str(ROOT), **{name: str(value) for name, value in variables.items()}}
    return subprocess.Popen([sys.executable, *arguments], env=env, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    outputs = [process.communicate(timeout=60)[1] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def by_hand(rank: int, port: int, world_size: int = 2) -> dict[str, object]:
    return {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def by_srun(rank: int, **changes: object) -> dict[str, object]:
    job = {"SLURM_JOB_ID": os.getpid(), "SLURM_STEP_ID": 0, "SLURM_NNODES": 1, "SLURM_NTASKS": 3}
    return {**job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, **changes}


def by_torchrun(rank: int, port: int) -> dict[str, object]:
    return {**by_hand(rank, port), "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "test"}


def test_the_same_error_is_reported_by_rank_0(port: int) -> None:
    results = finish(*(start([*PRETRAIN, *BAD], **by_hand(rank, port, 3)) for rank in (2, 1, 0)))
    assert [code for code, _ in results] == [2, 2, 2]
    assert [output.count(MESSAGE) for _, output in results] == [0, 0, 1], results


@pytest.mark.parametrize("changes", [{"MASTER_PORT": "abc"}, {"WORLD_SIZE": "8"}])
def test_error_under_srun_is_one_message(changes: dict[str, object]) -> None:
    results = finish(*(start(PRETRAIN, **by_srun(rank, **changes)) for rank in (2, 1, 0)))
    assert [code for code, _ in results] == [2, 2, 2]
    assert [output.count("error") for _, output in results] == [0, 0, 1], results


def test_error_of_one_rank_is_reported_while_rank_0_waits(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):  # like the rendezvous of rank 0
        ((code, output),) = finish(start([*PRETRAIN, *BAD], **by_hand(1, port)))
    assert code == 2 and output.startswith("error on rank 1:") and MESSAGE in output


def test_error_of_one_rank_is_reported_under_torchrun(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):  # like torchrun's agent
        ((code, output),) = finish(start([*PRETRAIN, *BAD], **by_torchrun(1, port)))
    assert code == 2 and output.startswith("error on rank 1:") and MESSAGE in output


def test_rank_of_a_node_is_silent_if_the_agent_of_rank_0_has_ended() -> None:
    assert run_ranks(_refuse_without_agent, 1, initialize=False) == [(2, "", "")]


def _refuse_without_agent(rank: int, world_size: int) -> Outcome:
    os.environ |= {name: str(value) for name, value in by_torchrun(1, port=1).items()}
    early_reports.time.sleep = lambda seconds: None  # torchrun's SIGTERM would arrive meanwhile
    return captured(BAD)


LEAVE = """
import os, signal, sys
from megatron_slm.runtime import early_reports
from megatron_slm.runtime.launch import Launch
early_reports.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)
early_reports.leave_quietly(Launch("torchrun", 1, 2, 1))
sys.exit(3)
"""


def test_silent_rank_that_torchrun_ends_is_not_listed() -> None:
    """torchrun lists every rank with a nonzero exit code after the first failed rank."""
    assert finish(start(["-c", LEAVE], TORCHELASTIC_RUN_ID="test")) == [(0, "")]


ENVIRONMENTS = [
    ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE is not set"),
    ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3, and must be below WORLD_SIZE 2"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ({**by_hand(1, 4711), "LOCAL_RANK": "abc"}, "LOCAL_RANK is 'abc'"),
    ({**by_hand(1, 4711), "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK is not set"),
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "neither MASTER_ADDR nor SLURM_JOB_NODELIST is set"),
    ({"SLURM_PROCID": "1"}, "SLURM_PROCID is 1, and SLURM_NTASKS is not set"),
]


@pytest.mark.parametrize(
    ("main", "argv", "variables", "message"),
    [*((pretrain.main, [], *case) for case in ENVIRONMENTS), (score_corpus.main, SCORE, *ENVIRONMENTS[0])],
)
def test_contradictory_environment_is_one_message(
    monkeypatch: pytest.MonkeyPatch, main: Main, argv: list[str], variables: dict[str, str], message: str
) -> None:
    for name in launcher_variables():
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    code, _, output = captured(argv, main)
    assert code == 2 and output.count("error") == 1 and message in output, output
