"""Console output: log lines on rank 0, warnings, and progress bars."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatron_slm.runtime.launch import launched_rank
from megatron_slm.runtime.output import fail_safe, prepare_output, print_error

SECONDS_BETWEEN_LINES = 10.0  # of a progress bar without a terminal
UNBOUNDED = 10_000  # columns of an output that is not a terminal; disables wrapping
BYTES = "B"  # unit of a progress bar in MB and MB/s


class Advance(Protocol):
    """Progress counter."""

    def advance(self, amount: float = 1) -> None: ...


class _Silent:
    """Progress counter of a silent rank."""

    def advance(self, amount: float = 1) -> None: ...


def make_console(enabled: bool = True) -> Console:
    """Return the console of a run on standard output, in color on a terminal; silent unless ``enabled``.

    Lines are not wrapped; tables are wrapped only on a terminal or if COLUMNS is set. A failing output, such as a log
    on a full disk or a closed pipe, does not end the run.
    """
    prepare_output()
    columns = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() or columns.isdigit() else UNBOUNDED
    if columns.isdigit() and int(columns) == 0:  # a terminal without a size, on which rich would print nothing
        width = shutil.get_terminal_size((UNBOUNDED, 0)).columns
    return Console(
        file=fail_safe(sys.stdout), quiet=not enabled, highlight=False, emoji=False, soft_wrap=True, width=width
    )


def warn(message: str) -> None:
    """Print a warning on standard error."""
    print_error(f"warning: {message}")


def notice(message: str) -> None:
    """Print a note on standard error, on rank 0."""
    if launched_rank() == 0:
        print_error(f"note: {message}")


def format_duration(seconds: float) -> str:
    """Format ``seconds`` as 42s, 3m07s, 2h05m or 3d04h."""
    rounded = int(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if rounded >= size:
            return f"{rounded // size}{unit}{rounded % size // small:02d}{small_unit}"
    return f"{rounded}s"


@contextmanager
def progress(description: str, total: float | None, unit: str = "it", *, enabled: bool = True) -> Iterator[Advance]:
    """Show a progress bar with rate and remaining time on standard error; without a terminal, periodic plain lines.

    The unit :data:`BYTES` is shown in MB and MB/s. Nothing is shown unless ``enabled``.
    """
    if not enabled:
        yield _Silent()
        return
    prepare_output()
    if not sys.stderr.isatty():
        plain = _PlainProgress(description, total, unit)
        yield plain
        plain.finish()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn() if unit == BYTES else MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=fail_safe(sys.stderr))) as bar:
        yield _RichProgress(bar, description, total)


def format_amount(number: float, unit: str) -> str:
    """Format a count with its unit: 1,200 tokens; 3.4 MB for bytes."""
    return f"{number / 1e6:,.1f} MB" if unit == BYTES else f"{number:,.0f} {unit}"


def format_rate(rate: float, unit: str) -> str:
    """Format a rate per second: 151 tokens/s; below ten with two significant digits, such as 0.042 steps/s."""
    is_small = unit != BYTES and 0 < rate < 10
    return f"{rate:.2g} {unit}/s" if is_small else f"{format_amount(rate, unit)}/s"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(format_rate(task.speed, self.unit) if task.speed else "")


class _RichProgress:
    def __init__(self, bar: Progress, description: str, total: float | None) -> None:
        self.bar = bar
        self.task = bar.add_task(description, total=total)

    def advance(self, amount: float = 1) -> None:
        self.bar.advance(self.task, amount)


class _PlainProgress:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0.0
        self.shown: float | None = None  # amount in the last line
        self.began = self.printed = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        if time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self._print()

    def finish(self) -> None:
        is_long = self.shown is not None or time.monotonic() - self.began > SECONDS_BETWEEN_LINES
        if is_long and self.shown != self.done:
            self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        self.shown = self.done
        rate = self.done / max(self.printed - self.began, 1e-9)
        text = f"{self.description}: {format_amount(self.done, self.unit)}"
        if self.total:
            remaining = max((self.total - self.done) / rate, 0.0) if rate else 0.0
            text += f" of {format_amount(self.total, self.unit)} ({self.done / self.total:.0%})"
            text += f", {format_duration(remaining)} left"
        print_error(f"{text}, {format_rate(rate, self.unit)}")
