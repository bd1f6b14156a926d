"""What a person sees: lines on rank 0, and a bar with rate and time left for long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0  # of a bar that is not on a terminal


class Advance(Protocol):
    """Something that counts work done."""

    def advance(self, amount: float = 1) -> None: ...


class Silent:
    """Counts nothing, for ranks that print nothing."""

    def advance(self, amount: float = 1) -> None: ...


def make_console(enabled: bool = True) -> Console:
    """The console of a run: standard output, colour on a terminal only, silent unless ``enabled``."""
    return Console(quiet=not enabled, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """``seconds`` as people say it: 42s, 3m07s, 2h05m, 3d04h."""
    whole = int(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{small_unit}"
    return f"{whole}s"


@contextmanager
def progress(description: str, total: float | None, unit: str = "it") -> Iterator[Advance]:
    """A bar with rate and time left on standard error; where that is no terminal, plain lines for work that lasts."""
    if not sys.stderr.isatty():
        plain = _PlainProgress(description, total, unit)
        yield plain
        plain.finish()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _RichProgress(bar, description, total)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {self.unit}/s" if task.speed else "")


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
        self.has_printed = False
        self.began = self.printed = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        if time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self._print()

    def finish(self) -> None:
        if self.has_printed or time.monotonic() - self.began > SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        self.has_printed = True
        rate = self.done / max(self.printed - self.began, 1e-9)
        text = f"{self.description}: {self.done:,.0f}"
        if self.total:
            left = (self.total - self.done) / rate if rate else 0.0
            text += f" of {self.total:,.0f} ({self.done / self.total:.0%}), {duration(max(left, 0))} left"
        print(f"{text}, {rate:,.0f} {self.unit}/s", file=sys.stderr, flush=True)
