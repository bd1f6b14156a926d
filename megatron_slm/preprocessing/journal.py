"""What a preprocessing job has written so far, block by block, so that it can go on after any death.

The first line holds the job's settings; each further one, written after the data of its block, says how far the input
is read, how long the output files are, and what was counted.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_slm.preprocessing.corpus_writer import write_all
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_replaceable

OUTPUT = "--output-prefix"
FIRST = b'{"--tokenizer-type": '  # bytes of every journal
TAIL = 1 << 20  # bytes of the file that are looked at: thousands of blocks, where one is enough after a kill


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    part: int = 0  # number of the part of the input that is read next
    offset: int = 0  # in it
    line: int = 0  # lines (or rows) of it that are read
    sizes: tuple[tuple[int, ...], ...] = ()  # of the output files, by key
    counts: tuple[int, ...] = ()  # what the summary counts
    is_complete: bool = False  # all is written: only the names are to be given


class Journal:
    """An append-only file of :class:`Progress`, held by one process at a time.

    Args:
        path: of the file.
        settings: of the job, by the flag that gives them: what must be the same for it to go on.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.file: IO[bytes] | None = None

    def open(self, resume: bool, holds: Callable[[Progress], bool]) -> Progress | None:
        """Open the file, and with ``resume`` find the last block that it tells of.

        Args:
            resume: go on where the file ends, if there is one.
            holds: are the output files as long as this?

        Returns:
            None where the job begins anew.

        Raises:
            ConfigError: another process has it, it is no journal, or other settings than this job's are in it.
        """
        check_replaceable(self.path, OUTPUT, is_ours=_is_journal)
        file = self.path.open("a+b", buffering=0)
        lock_output(file)
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
                [progress.part, progress.offset, progress.line, progress.sizes, progress.counts, progress.is_complete],
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
        assert self.file is not None, "open() comes first"
        write_all(self.file, line.encode() + b"\n")

    def _last(self, holds: Callable[[Progress], bool]) -> tuple[Progress, int] | None:
        """The last progress that is whole and that the output files bear out, and where its line ends."""
        assert self.file is not None, "open() comes first"
        header = self.file.readline()
        if not header.endswith(b"\n"):
            return None
        self._compare(json.loads(header))
        for line, end in _last_lines(self.file, self.file.tell()):
            progress = _progress(line)
            if progress is not None and holds(progress):
                return progress, end
        return None

    def _compare(self, earlier: dict[str, Any]) -> None:
        for name in dict.fromkeys((*earlier, *self.settings)):
            there, here = earlier.get(name), self.settings.get(name)
            if there == here:
                continue
            if isinstance(there, list) and isinstance(here, list):
                there, here = _first_difference(there, here)
            raise ConfigError(
                f"--resume: the stopped job had {name} {there}, and this one has {here}. Resume it with the settings "
                "and files that it began with, or leave --resume away to begin anew."
            )


def lock_output(file: IO[bytes]) -> None:
    """Lock an output file until it is closed, or close it and raise ConfigError if another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ConfigError(
                f"{OUTPUT}: another process is writing there ({file.name} is locked). Wait for it, or give another "
                "prefix."
            ) from error
        # a file system without locks: then the user takes care


def _is_journal(path: Path) -> bool:
    """Return whether a file begins with the settings of a job, which may be cut short, or is empty."""
    with path.open("rb") as file:
        begin = file.read(len(FIRST))
    return FIRST.startswith(begin)


def _first_difference(there: list[Any], here: list[Any]) -> tuple[Any, Any]:
    return next(pair for pair in itertools.zip_longest(there, here, fillvalue="nothing there") if pair[0] != pair[1])


def _progress(line: bytes) -> Progress | None:
    try:
        part, offset, count, sizes, counts, is_complete = json.loads(line)
    except ValueError:
        return None
    return Progress(part, offset, count, tuple(map(tuple, sizes)), tuple(counts), is_complete)


def _last_lines(file: IO[bytes], begin: int) -> list[tuple[bytes, int]]:
    """(line, where it ends in the file) of the last whole lines behind ``begin``, from the last one back."""
    place = max(begin, file.seek(0, os.SEEK_END) - TAIL)
    file.seek(place)
    found = []
    for line in file:
        place += len(line)
        if line.endswith(b"\n"):
            found.append((line, place))
    return found[::-1]
