"""Kill a training run with SIGKILL at random moments, and verify that it loses nothing.

The training command is run twice in a new directory: undisturbed, and killed repeatedly, during steps, saves and
start-up. After each kill the tracker file must name a complete, intact checkpoint that is not older than before, from
which the run is restarted. Finally the losses of all steps must be equal, bit for bit, to those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from megatron_slm.analysis.soak import (
    SAVE,
    Attempt,
    Launch,
    Soak,
    differences,
    kill_and_restart,
    plan_kills,
    run_undisturbed,
)
from megatron_slm.config.flags import Parser, parse, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.runtime.console import format_duration, make_console, progress
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import explained_write, is_json_of, write_text
from megatron_slm.runtime.reporting import run_tool

SEPARATOR = "--"
PRELOADED = ["megatron_slm.cli.pretrain", "megatron_slm.training.replay", "megatron_slm.training.setup"]
FAILED = 1  # exit code if losses differ
SHOWN_PROBLEMS = 20
UNDISTURBED, KILLED = "undisturbed", "killed"  # subdirectories


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return the settings of the test and the training arguments.

    Raises:
        ConfigError: an unknown flag or an invalid value.
    """
    before, training = list(argv), list[str]()
    if SEPARATOR in before:
        place = before.index(SEPARATOR)
        before, training = before[:place], before[place + 1 :]
    parser = Parser(description=__doc__, usage="%(prog)s --directory DIR [--kills N] [...] -- TRAINING ARGUMENTS")
    add = parser.add_argument
    add("--directory", type=expand_user, required=True, help="new or empty directory for both runs and their logs")
    add("--kills", type=int, default=10, help="number of kills")
    add("--seed", type=int, default=1, help="random seed of the moments")
    add("--nproc-per-node", type=int, default=1, help="number of ranks, started by megatron_slm.torchrun if above 1")
    add("--fork", action="store_true", help="fork each start from a process with all imports; one rank only")
    add("--alternate", metavar="FLAG", help="training flag of every other start, for example --alternate=--async-save")
    add("--output", type=expand_user, help="JSON file for the result")
    return parse_strictly(parser, before, {}), training


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 1 if losses differ, 2 for an error or a lost checkpoint."""
    results: list[Soak] = []
    code = run_tool(lambda: results.append(soak(sys.argv[1:] if argv is None else argv)))
    return code or (FAILED if results[0].problems else 0)


def soak(argv: Sequence[str]) -> Soak:
    """Run the soak test of a command line, and print its result.

    Raises:
        ConfigError: a run fails, a checkpoint is lost, or the arguments are invalid.
    """
    arguments, training = parse_arguments(argv)
    steps = _check(arguments, training)
    directory, console = Path(arguments.directory), make_console()
    with explained_write(directory, "--directory"):
        directory.mkdir(parents=True, exist_ok=True)
    launch = _launcher(arguments, training)
    began = time.monotonic()
    timing = run_undisturbed(launch, directory / UNDISTURBED, directory / f"{UNDISTURBED}.log")
    console.print(
        f"undisturbed run: {steps} steps in {format_duration(time.monotonic() - began)}; start {timing.start:.2f} s, "
        f"step {timing.step:.3f} s, save {timing.save:.3f} s"
    )
    result = Soak(arguments.seed, steps=steps)
    moments, log = plan_kills(arguments.kills, steps, arguments.seed), directory / f"{KILLED}.log"
    with progress("kills", arguments.kills, "kills") as bar:
        for kill in kill_and_restart(launch, directory / KILLED, log, moments, timing):
            result.kills.append(kill)
            bar.advance()
            console.print(f"kill {kill.number}/{arguments.kills} {kill.describe()}")
    result.problems = differences(directory / KILLED, directory / UNDISTURBED, steps)[:SHOWN_PROBLEMS]
    console.print(_summary(result, time.monotonic() - began), markup=False)
    if arguments.output is not None:
        is_result = partial(is_json_of, kind="soak")
        write_text(arguments.output, json.dumps(result.record(), indent=1) + "\n", "--output", is_ours=is_result)
    return result


def _summary(result: Soak, seconds: float) -> str:
    during = Counter(kill.during for kill in result.kills)
    text = f"{len(result.kills)} kills in {format_duration(seconds)}, {during[SAVE]} during a save"
    if result.problems:
        return "\n".join((f"{text}: the runs differ.", *result.problems))
    return f"{text}: no checkpoint lost, and all {result.steps} steps equal to the undisturbed run bit for bit"


def _check(arguments: argparse.Namespace, training: list[str]) -> int:
    """Return the number of steps of the run.

    Raises:
        ConfigError: the arguments are invalid.
    """
    if not training:
        raise ConfigError(f"there are no training arguments. Give them after {SEPARATOR}.")
    config = parse(training).config
    for flag, value in (("--save", config.checkpoint.save), ("--load", config.checkpoint.load)):
        if value is not None:
            raise ConfigError(f"{flag} {value}: the test chooses the directory, in --directory. Leave {flag} out.")
    if config.training.train_iters is None or config.checkpoint.save_interval is None:
        raise ConfigError("the training arguments need --train-iters and --save-interval.")
    if arguments.kills < 1 or arguments.nproc_per_node < 1:
        raise ConfigError("--kills and --nproc-per-node must be above 0.")
    if arguments.fork and arguments.nproc_per_node > 1:
        raise ConfigError("--fork starts one rank. Leave it out, or leave out --nproc-per-node.")
    directory = Path(arguments.directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"--directory {directory} is not empty. Choose another directory.")
    return config.training.train_iters


def _launcher(arguments: argparse.Namespace, training: list[str]) -> Launch:
    """Return the function that starts the run."""
    command = [sys.executable, "-m"]
    if arguments.nproc_per_node > 1:
        command += ["megatron_slm.torchrun", "--standalone", "--nproc-per-node", str(arguments.nproc_per_node), "-m"]
    command.append("megatron_slm.pretrain")

    alternatives = cycle([[], [arguments.alternate] if arguments.alternate else []])

    def launch(save: Path, log: Path) -> Attempt:
        argv = [*training, *next(alternatives), "--save", str(save), "--load", str(save), "--log-interval", "1"]
        if arguments.fork:
            return _Forked(argv, log)
        with log.open("wb") as file:
            return _Command([*command, *argv], file.fileno())

    return launch


class _Command:
    """Implement an attempt as a new process, with its descendants."""

    def __init__(self, command: list[str], output: int) -> None:
        self._process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    def exit_code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        kill_tree(self._process.pid)
        self._process.wait()


class _Forked:
    """Implement an attempt as a fork of a process that has imported the trainer."""

    def __init__(self, argv: list[str], log: Path) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process: BaseProcess = context.Process(target=_train, args=(argv, str(log)))
        self._process.start()

    def exit_code(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        assert self._process.pid is not None
        kill_tree(self._process.pid)
        self._process.join()


def _train(argv: list[str], log: str) -> None:
    from megatron_slm.cli.pretrain import main as pretrain

    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pretrain(argv))


def kill_tree(pid: int) -> None:
    """Kill a process and all of its descendants with SIGKILL, and wait until they have ended."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family[1:], timeout=10)
