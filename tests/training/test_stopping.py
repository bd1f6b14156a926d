"""Test that all ranks save before an early stop: after signals to one rank or to torchrun, and at a time limit."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_slm.config.checkpoint_files import latest_step
from megatron_slm.config.paths import STOP_FILE
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import Outcome, _main, captured, command, launch, losses, make_corpus, records
from megatron_slm.training import stopping

FOREVER = ["--train-iters", "10000", "--lr-decay-iters", "1000"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("stopping") / "corpus", 1)


class Torchrun:
    """Run the trainer under torchrun on two ranks."""

    def __init__(self, argv: list[str], log: Path) -> None:
        self.log = log
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*torchrun, "-m", "megatron_slm.pretrain", *argv],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def kill(self) -> None:
        """Kill all remaining processes."""
        if self.process.poll() is None:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)


@pytest.fixture
def torchrun() -> Iterator[Callable[..., Torchrun]]:
    """Return a function that starts the trainer under torchrun, and clean up after failed tests."""
    runs: list[Torchrun] = []

    def start(*arguments: Any, **options: Any) -> Torchrun:
        runs.append(Torchrun(*arguments, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def test_signal_to_one_rank_interrupts_an_evaluation_and_saves(tmp_path: Path, corpus: str) -> None:
    save = tmp_path / "run"
    launch(command(corpus, save, dp=2, exit_interval=1, eval_iters=1) + FOREVER, 2)
    argv = command(corpus, save, dp=2, load=save, eval_interval=3, eval_iters=10_000) + FOREVER
    outcome, other = run_ranks(_signalled_while_evaluating, 2, argv, save, initialize=False)
    assert outcome.code == other.code == 0, (outcome, other)
    assert latest_step(save) == 3 and "stopping after step 3: SIGUSR1" in outcome.output, outcome
    assert [record["step"] for record in records(save, "eval")] == [0, 1]
    assert (save / STOP_FILE).read_text() == "SIGUSR1\n"
    again = command(corpus, save, dp=2, load=save, eval_interval=3, eval_iters=1)
    for last in ("4", "5"):  # no evaluation is missing the second time
        launch([*again, *FOREVER, "--exit-interval", last], 2)
    assert [record["step"] for record in records(save, "eval")] == [0, 1, 3, 4, 5]
    assert not (save / STOP_FILE).exists()


def _signalled_while_evaluating(rank: int, world_size: int, argv: list[str], save: Path) -> Outcome:
    """Run the trainer; rank 1 receives a signal that its parent process ignores, as torchrun under Slurm may."""

    def signal_after_step_3() -> None:
        while len(losses(save)) < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if rank == 1:
        threading.Thread(target=signal_after_step_3, daemon=True).start()
    return captured(argv)


def test_ranks_save_if_torchrun_is_killed(tmp_path: Path, corpus: str, torchrun: Callable[..., Torchrun]) -> None:
    """torchrun neither ignores nor forwards SIGUSR1, and is ended by it."""
    save = tmp_path / "run"
    run = torchrun(command(corpus, save, dp=2) + FOREVER, tmp_path / "log")
    run.wait_for(lambda: (save / "metrics.jsonl").is_file() and len(losses(save)) > 1)
    ranks = run.ranks()
    run.process.send_signal(signal.SIGUSR1)
    assert run.process.wait(60) == -signal.SIGUSR1
    _, alive = psutil.wait_procs(ranks, 60)
    assert not alive
    assert latest_step(save) == len(losses(save)), run.text()


def test_time_limit_on_one_rank_stops_all_ranks(tmp_path: Path, corpus: str) -> None:
    argv = command(corpus, tmp_path / "run", dp=2, exit_duration_in_mins=60, eval_iters=1) + FOREVER
    results = run_ranks(_with_a_fast_clock, 2, argv, initialize=False)
    assert [code for code, _ in results] == [0, 0], results
    assert latest_step(tmp_path / "run") == len(losses(tmp_path / "run")) > 0
    assert [record["step"] for record in records(tmp_path / "run", "eval")] == [0]  # no time for another


def _with_a_fast_clock(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    """Run the trainer; rank 1's clock jumps ahead by two hours after about twenty calls."""
    if rank == 1:
        monotonic, calls = time.monotonic, itertools.count()
        clock = SimpleNamespace(time=time.time, monotonic=lambda: monotonic() + 7200 * (next(calls) > 20))
        stopping.time = clock  # type: ignore[assignment]
    return _main(rank, world_size, argv)


def test_signal_before_the_first_step_ends_the_run(tmp_path: Path, corpus: str) -> None:
    argv = command(corpus, tmp_path / "run") + FOREVER
    ((code, errors),) = run_ranks(_signalled_while_building, 1, argv, initialize=False)
    assert code == 0 and "SIGTERM received" in errors
    assert latest_step(tmp_path / "run") is None and not records(tmp_path / "run")


def _signalled_while_building(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    from megatron_slm.training import setup

    build = setup.build_run

    def signalled(*args: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*args)  # type: ignore[arg-type]

    setup.build_run = signalled  # type: ignore[assignment]
    write, written = os.write, []
    os.write = lambda descriptor, data: written.append(data) or write(descriptor, data)  # type: ignore[assignment]
    code, errors = _main(rank, world_size, argv)
    return code, errors + b"".join(written).decode(errors="replace")
