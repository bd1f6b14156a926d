"""Test that a dead or hung rank ends a run with a message that names it, and that a suspended run continues."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import pretrain, score_corpus
from megatron_slm.data.batches import BatchStream
from megatron_slm.reference.scoring import _Scorer
from megatron_slm.runtime.health import stragglers
from megatron_slm.runtime.health.ending import EXIT_CODE
from megatron_slm.testing.ranks import fork_server, reserved_port
from megatron_slm.testing.tiny import MODEL, command, launch, make_corpus, records

SECONDS = 120
ONE_LAYER = ["--num-layers", "1", *MODEL[2:]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("health") / "corpus", 1)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def deadlock() -> None:
    threading.Event().wait()


def be_slow() -> None:
    time.sleep(0.2)


FAULTS = {"killed": kill, "stopped": stop, "deadlocked": deadlock, "slow": be_slow}
WORK: dict[Any, tuple[type, str]] = {  # methods of the commands that fail
    pretrain.main: (BatchStream, "__next__"),
    score_corpus.main: (_Scorer, "_score"),
}


def start(
    directory: Path, argv: list[str], fault: str, faulty: int, ranks: int = 2, main: Any = pretrain.main
) -> list[BaseProcess]:
    """Start a command; the faulty rank has a fault from the third step."""
    with reserved_port() as port:
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        arguments = [
            (rank, variables, directory, argv, FAULTS.get(fault) if rank == faulty else None, main)
            for rank in range(ranks)
        ]
        processes: list[BaseProcess] = [fork_server().Process(target=_rank, args=each) for each in arguments]
        for process in processes:
            process.start()
        _wait(lambda: (directory / "joined").exists() or not all(process.is_alive() for process in processes))
    return processes


def _rank(rank: int, variables: dict[str, str], directory: Path, argv: list[str], fault: Any, main: Any) -> None:
    os.environ |= {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(directory / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    stragglers.MIN_STEPS, stragglers.MIN_SECONDS = 3, 0.0
    owner, name = WORK[main]
    work, calls = getattr(owner, name), []

    def failing(*arguments: Any) -> Any:
        (directory / "joined").touch()
        calls.append(arguments)
        if len(calls) > 2 and fault is not None:
            fault()
        return work(*arguments)

    setattr(owner, name, failing)
    sys.exit(main(argv))


def _wait(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def finish(processes: list[BaseProcess], directory: Path) -> tuple[list[int | None], list[str]]:
    """Return exit codes and standard errors."""
    try:
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes], [
        (directory / f"errors{rank}").read_text() for rank in range(len(processes))
    ]


def settings(corpus: str, save: Path, **flags: Any) -> list[str]:
    return command(corpus, save, dp=2, model=ONE_LAYER, eval_iters=0, **{"train_iters": 8, **flags})


@pytest.mark.parametrize(
    ("fault", "faulty", "messages"),
    [
        ("killed", 1, ["died without a message", "Its last message, "]),
        pytest.param("killed", 0, ["died without a message"], marks=pytest.mark.slow),
        ("stopped", 1, ["has not responded for"]),
        pytest.param("stopped", 0, ["has not responded for"], marks=pytest.mark.slow),
        (
            "deadlocked",
            1,
            ["hangs: no progress for", "in step 3, loading a batch", "in deadlock", "rank 0: step 3, training"],
        ),
    ],
)
def test_run_ends_with_message_about_rank(
    tmp_path: Path, corpus: str, fault: str, faulty: int, messages: list[str]
) -> None:
    logs = tmp_path / "logs"
    argv = settings(corpus, tmp_path / "run", slm_hang_timeout=2, slm_log_dir=logs)
    codes, errors = finish(start(tmp_path, argv, fault, faulty), tmp_path)
    assert codes[1 - faulty] == EXIT_CODE and codes[faulty] in (-signal.SIGKILL, EXIT_CODE), (codes, errors)
    text = "".join(errors)
    assert text.count("error:") == 1 and f"error: rank {faulty} on " in text, text
    assert all(message in text for message in messages) and "Traceback" not in text, text
    assert messages[0] in (logs / f"rank_{1 - faulty:05d}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "message"), [("killed", "died without"), ("deadlocked", "in deadlock")])
def test_scoring_ends_with_message_about_rank(tmp_path: Path, corpus: str, fault: str, message: str) -> None:
    launch(command(corpus, tmp_path / "rm", model=ONE_LAYER, train_iters=1))
    argv = ["--reference-load", str(tmp_path / "rm"), "--data-path", corpus, "--reference-scores", f"{tmp_path}/new"]
    argv += ["--slm-hang-timeout", "2", "--micro-batch-size", "1"]
    codes, errors = finish(start(tmp_path, argv, fault, 1, main=score_corpus.main), tmp_path)
    assert codes[0] == EXIT_CODE, (codes, errors)
    text = "".join(errors)
    assert text.count("error: rank 1 on ") == 1 and message in text and "Traceback" not in text, text


@pytest.mark.slow
def test_suspended_run_continues(tmp_path: Path, corpus: str) -> None:
    argv = settings(corpus, tmp_path / "run", slm_hang_timeout=2, train_iters=40)
    processes = start(tmp_path, argv, "", 0)
    for number, pause in ((signal.SIGSTOP, 4.0), (signal.SIGCONT, 0.0)):
        for process in processes:
            assert process.pid is not None
            os.kill(process.pid, number)
        time.sleep(pause)
    codes, errors = finish(processes, tmp_path)
    assert codes == [0, 0], errors


def test_slow_rank_is_named(tmp_path: Path, corpus: str) -> None:
    argv = settings(corpus, tmp_path / "run", slm_hang_timeout=5, train_iters=24)  # a message per second, for 5 seconds
    codes, errors = finish(start(tmp_path, argv, "slow", 1), tmp_path)
    assert codes == [0, 0], errors
    assert "warning: slow ranks" in errors[0] and "rank 1 on " in errors[0] and "loading batches" in errors[0]
    slowest = [record for record in records(tmp_path / "run") if record["slowest_rank"] is not None]
    assert slowest and slowest[-1]["slowest_rank"] == 1 and slowest[-1]["slowest_rank_ratio"] > 1.5
