"""Kill a training run at random moments, restart it, and compare it with an undisturbed run."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from megatron_slm.config.checkpoint_files import check_sizes, latest_step, read_manifest, step_directory
from megatron_slm.config.paths import METRICS_FILE
from megatron_slm.runtime.checksums import file_checksums, text_checksum
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.metrics_file import REPRODUCIBLE, read_records

EVALUATED = ("set", "loss", "tokens_evaluated")
RESUMING = re.compile(r"^resuming from \S*iter_0*(\d+)", re.MULTILINE)
STEP, SAVE, START = "step", "save", "start"  # moments of kills
WEIGHTS = {STEP: 0.35, SAVE: 0.5, START: 0.15}
LAST_TARGET = 0.9  # of the run; later kills might come after its end
SECONDS_BETWEEN_LOOKS = 0.002
LOG_TAIL = 20  # lines of a failed run that are shown


class Attempt(Protocol):
    """Represent a started run with all of its processes."""

    def exit_code(self) -> int | None:
        """Return the exit code, or None if the run is active."""

    def kill(self) -> None:
        """Kill all processes with SIGKILL, and wait for their end."""


Launch = Callable[[Path, Path], Attempt]  # --save directory, log file


@dataclass(frozen=True)
class Timing:
    """Hold the durations of an undisturbed run in seconds."""

    start: float  # until the first step has ended
    step: float
    save: float


@dataclass(frozen=True)
class Moment:
    """Represent the planned moment of a kill."""

    kind: str  # STEP, SAVE or START
    target: int  # after the end of this step; not for START
    fraction: float  # of the time of two steps, of a save, or of a start


@dataclass(frozen=True)
class Kill:
    """Represent a kill and its consequences."""

    number: int
    kind: str
    step: int  # newest logged step of the killed process; 0 before the first
    saving: bool  # whether a checkpoint was being written
    newest_before: int | None  # newest complete checkpoint before the kill
    newest_after: int | None  # and after it, verified by its checksums
    resumed_from: int | None  # checkpoint that the killed process had started from
    seconds: float  # since its start

    @property
    def during(self) -> str:
        """Return the activity that the kill interrupted."""
        return SAVE if self.saving else STEP if self.step else START

    def describe(self) -> str:
        """Return one line for the log."""
        newest = "no checkpoint yet" if self.newest_after is None else f"checkpoint {self.newest_after} is intact"
        return f"after {self.seconds:.2f} s, step {self.step}, during a {self.during}: {newest}"


@dataclass
class Soak:
    """Hold the result of a soak test."""

    seed: int
    kills: list[Kill] = field(default_factory=list)
    steps: int = 0
    problems: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return {"kind": "soak", **asdict(self)}


def plan_kills(count: int, steps: int, seed: int) -> list[Moment]:
    """Return the moments of ``count`` kills of a run, in the order of their steps."""
    rng = random.Random(seed)
    targets = sorted(rng.randint(1, max(int(LAST_TARGET * steps), 1)) for _ in range(count))
    kinds = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)
    return [Moment(kind, target, rng.random()) for kind, target in zip(kinds, targets, strict=True)]


class Watch:
    """Observe the progress of a started run from its files."""

    def __init__(self, save: Path) -> None:
        self._save, self._metrics = save, save / METRICS_FILE
        self._began = time.time_ns()

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return (time.time_ns() - self._began) / 1e9

    def step(self) -> int:
        """Return the newest step that this start has logged, or 0."""
        try:
            if self._metrics.stat().st_mtime_ns < self._began:
                return 0
            last = self._metrics.read_bytes().splitlines(keepends=True)[-1]
        except (OSError, IndexError):
            return 0
        return int(json.loads(last)["step"]) if last.endswith(b"\n") else 0

    def is_saving(self) -> bool:
        """Return whether this start is writing a checkpoint."""
        return any(_changed(path) >= self._began for path in self._save.glob("iter_*.partial"))


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # renamed in the meantime
        return 0


@contextmanager
def _started(launch: Launch, save: Path, log: Path) -> Iterator[tuple[Attempt, Watch]]:
    """Yield a started run, which is killed if the block raises."""
    attempt = launch(save, log)
    try:
        yield attempt, Watch(save)
    except BaseException:
        attempt.kill()
        raise


def run_undisturbed(launch: Launch, save: Path, log: Path) -> Timing:
    """Run to the end without a kill, and return the durations.

    Raises:
        ConfigError: the run fails.
    """
    first, saves, began = None, list[float](), None
    with _started(launch, save, log) as (attempt, watch):
        while (code := attempt.exit_code()) is None:
            if first is None and watch.step():
                first = watch.seconds
            is_saving = watch.is_saving()
            if is_saving and began is None:
                began = watch.seconds
            elif not is_saving and began is not None:
                saves.append(watch.seconds - began)
                began = None
            time.sleep(SECONDS_BETWEEN_LOOKS)
    _check_exit(code, log)
    steps = [record["seconds"] for record in read_records(save / METRICS_FILE) if record["kind"] == "train"]
    return Timing(first or watch.seconds, median(steps), median(saves) if saves else 0.0)


def kill_and_restart(launch: Launch, save: Path, log: Path, moments: list[Moment], timing: Timing) -> Iterator[Kill]:
    """Yield each kill of a run, which is restarted after it; finally run it to its end.

    Raises:
        ConfigError: a start fails, or a checkpoint is lost.
    """
    for number, moment in enumerate(moments, start=1):
        yield _kill(launch, save, log, number, moment, timing)
    with _started(launch, save, log) as (attempt, _):
        while (code := attempt.exit_code()) is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    _check_exit(code, log)


def _kill(launch: Launch, save: Path, log: Path, number: int, moment: Moment, timing: Timing) -> Kill:
    """Start a run, kill it at a moment, and verify its newest checkpoint."""
    with _started(launch, save, log) as (attempt, watch):
        code = _wait(attempt, watch, moment, timing)
        if code is None:
            before, saving = latest_step(save), watch.is_saving()
            attempt.kill()
    if code is not None:  # the run has ended before its kill: kill the next start, which has nothing to train
        _check_exit(code, log)
        return _kill(launch, save, log, number, Moment(START, moment.target, 0.5 * moment.fraction), timing)
    after = latest_step(save)
    if before is not None and (after is None or after < before):
        raise ConfigError(f"kill {number}: checkpoint {before} of {save} is lost; the newest is {after}.")
    if after is not None:
        verify_checkpoint(save, after)
    return Kill(number, moment.kind, watch.step(), saving, before, after, _resumed_from(log), watch.seconds)


def _wait(attempt: Attempt, watch: Watch, moment: Moment, timing: Timing) -> int | None:
    """Wait for the moment of a kill; return the exit code if the run ends before it."""
    delay = {START: timing.start, STEP: 2 * timing.step, SAVE: timing.save}[moment.kind] * moment.fraction
    reached: float | None = watch.seconds if moment.kind == START else None
    while (code := attempt.exit_code()) is None:
        if reached is None and watch.step() >= moment.target and (moment.kind == STEP or watch.is_saving()):
            reached = watch.seconds
        if reached is not None and watch.seconds >= reached + delay:
            return None
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return code


def verify_checkpoint(save: Path, step: int) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        ConfigError: the checkpoint is incomplete or damaged.
    """
    directory = step_directory(save, step)
    manifest = read_manifest(directory, "--save", text_checksum)
    check_sizes(directory, manifest, "--save")
    names = sorted(manifest.files)
    found = dict(zip(names, file_checksums([directory / name for name in names], "--save"), strict=True))
    if damaged := [name for name in names if found[name] != manifest.checksums[name]]:
        raise ConfigError(f"--save: the checkpoint {directory} is damaged: {', '.join(damaged)}.")


def differences(save: Path, undisturbed: Path, steps: int) -> list[str]:
    """Return a message for every difference of the metrics of two runs, except times."""
    ours, theirs = (list(read_records(directory / METRICS_FILE)) for directory in (save, undisturbed))
    found = []
    for kind, names in (("train", REPRODUCIBLE), ("eval", EVALUATED)):
        one, other = ([record for record in records if record["kind"] == kind] for records in (ours, theirs))
        expected = {_key(record): record for record in other}
        if kind == "train" and [record["step"] for record in one] != list(range(1, steps + 1)):
            found.append(f"{save / METRICS_FILE} has the steps {[record['step'] for record in one]}")
        if kind == "eval" and {_key(record) for record in one} != expected.keys():
            found.append(f"{save / METRICS_FILE} has other evaluations than the undisturbed run")
        for record in one:
            for name in names:
                if (known := expected.get(_key(record), {}).get(name)) != record[name]:
                    found.append(f"step {record['step']}: {kind} {name} {record[name]} differs from {known}")
    return found


def _key(record: dict[str, Any]) -> tuple[int, str]:
    return record["step"], record.get("set", "")


def _resumed_from(log: Path) -> int | None:
    match = RESUMING.search(log.read_text(encoding="utf-8", errors="replace"))
    return int(match.group(1)) if match is not None else None


def _check_exit(code: int, log: Path) -> None:
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
        raise ConfigError("\n".join((f"the run exited with code {code}; the end of {log}:", *tail)))
