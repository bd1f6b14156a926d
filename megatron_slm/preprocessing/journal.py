"""Journal of a preprocessing job, from which the job can be resumed after it was killed at any moment.

The first line contains the settings of the job. Every other line is written after the data of a block and records the
input position, the sizes of the output files, and the counts.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_replaceable, lock_output, write_all

OUTPUT = "--output-prefix"
FIRST = b'{"--tokenizer-type": '  # first bytes of every journal
TAIL = 1 << 20  # bytes searched from the end: thousands of blocks, of which a kill invalidates one


@dataclass(frozen=True)
class Progress:
    """Preprocessing progress: input position, output sizes and counts."""

    chunk: int = 0  # number of the next input chunk
    offset: int = 0  # position in the chunk
    line: int = 0  # lines (or rows) read from the chunk
    sizes: tuple[tuple[int, ...], ...] = ()  # sizes of the output files, by key
    counts: tuple[int, ...] = ()  # counts of the summary
    is_complete: bool = False  # all data is on disk, and only the renames remain


class Journal:
    """Append-only file of :class:`Progress`, locked by one process at a time.

    Args:
        path: path of the journal.
        settings: settings by flag, which must not change when the job is resumed.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.file: IO[bytes] | None = None

    def open(self, resume: bool, holds: Callable[[Progress], bool]) -> Progress | None:
        """Open and lock the journal, and return the last valid progress if ``resume`` is set.

        Args:
            resume: continue from an existing journal.
            holds: whether the output files have at least the sizes of a progress.

        Returns:
            the progress to resume from, or None if the job starts from scratch.

        Raises:
            ConfigError: another process holds the lock, the file is not a journal, or it records other settings.
        """
        check_replaceable(self.path, OUTPUT, is_ours=_is_journal)
        file = self.path.open("a+b", buffering=0)
        lock_output(file, OUTPUT)
        self.file = file
        self.file.seek(0)
        if resume and self.file.read(1):
            self.file.seek(0)
            found = self._last(holds)
            if found is not None:
                progress, end = found
                self.file.truncate(end)
                return progress
        self.file.truncate(0)
        self._write(json.dumps(self.settings))
        return None

    def add(self, progress: Progress) -> None:
        self._write(
            json.dumps(
                [progress.chunk, progress.offset, progress.line, progress.sizes, progress.counts, progress.is_complete],
                separators=(",", ":"),
            )
        )

    def is_open(self) -> bool:
        return self.file is not None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def _write(self, line: str) -> None:
        assert self.file is not None, "the journal is open"
        write_all(self.file, line.encode() + b"\n")

    def _last(self, holds: Callable[[Progress], bool]) -> tuple[Progress, int] | None:
        """Return the last complete progress that the output files support, and the end offset of its line."""
        assert self.file is not None, "the journal is open"
        header = self.file.readline()
        if not header.endswith(b"\n"):
            return None
        self._compare(json.loads(header))
        for line, end in _last_lines(self.file, self.file.tell()):
            progress = _progress(line)
            if progress is not None and holds(progress):
                return progress, end
        return None

    def _compare(self, recorded: dict[str, Any]) -> None:
        for name in dict.fromkeys((*recorded, *self.settings)):
            earlier, current = recorded.get(name), self.settings.get(name)
            if earlier == current:
                continue
            if isinstance(earlier, list) and isinstance(current, list):
                earlier, current = _first_difference(earlier, current)
            raise ConfigError(
                f"--resume: the stopped job had {name} {earlier}, but this one has {current}. Resume it with its "
                "original settings and files, or omit --resume to start from scratch."
            )


def _is_journal(path: Path) -> bool:
    """Return whether a file is empty or starts with the settings of a job, which may be truncated."""
    with path.open("rb") as file:
        first = file.read(len(FIRST))
    return FIRST.startswith(first)


def _first_difference(earlier: list[Any], current: list[Any]) -> tuple[Any, Any]:
    pairs = itertools.zip_longest(earlier, current, fillvalue="nothing")
    return next(pair for pair in pairs if pair[0] != pair[1])


def _progress(line: bytes) -> Progress | None:
    try:
        chunk, offset, count, sizes, counts, is_complete = json.loads(line)
    except ValueError:
        return None
    return Progress(chunk, offset, count, tuple(map(tuple, sizes)), tuple(counts), is_complete)


def _last_lines(file: IO[bytes], begin: int) -> list[tuple[bytes, int]]:
    """Return the last complete lines after offset ``begin`` with their end offsets, in reverse order."""
    place = max(begin, file.seek(0, os.SEEK_END) - TAIL)
    file.seek(place)
    found = []
    for line in file:
        place += len(line)
        if line.endswith(b"\n"):
            found.append((line, place))
    return found[::-1]
