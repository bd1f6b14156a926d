"""Input files of any supported kind as a stream of lines or documents, with the place each one came from."""

from __future__ import annotations

import glob
import gzip
import io
import lzma
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_slm.runtime.errors import ConfigError

STDIN = "-"


@dataclass(frozen=True)
class RawDocument:
    """One document as it stands in a file: a line of JSON, or plain text."""

    content: bytes
    is_json: bool
    file: str
    line: int  # counted from 1; of a plain text, where it begins


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """Files named by paths and globs, in the order given, each glob sorted.

    Raises:
        ConfigError: a path or glob that names nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        names = [pattern] if pattern == STDIN or Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not names:
            raise ConfigError(f"--input {pattern}: there is no such file, and no file matches it.")
        found += names
    return found


def read_documents(files: Sequence[str]) -> Iterator[RawDocument]:
    """The documents of all files in order: lines of JSON, or of .txt files, texts between blank lines."""
    for name in files:
        with _open(name) as stream:
            if ".txt" in Path(name).suffixes:
                yield from _texts(stream, name)
            else:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield RawDocument(line, True, name, number)


def total_bytes(files: Sequence[str]) -> int | None:
    """Bytes of all files as they lie on disk; None where standard input is among them."""
    return None if STDIN in files else sum(Path(name).stat().st_size for name in files)


def _texts(stream: IO[bytes], name: str) -> Iterator[RawDocument]:
    lines: list[bytes] = []
    begin = 1
    for number, line in enumerate(stream, 1):
        if line.strip():
            if not lines:
                begin = number
            lines.append(line)
        elif lines:
            yield RawDocument(b"".join(lines), False, name, begin)
            lines = []
    if lines:
        yield RawDocument(b"".join(lines), False, name, begin)


def _open(name: str) -> IO[bytes]:
    if name == STDIN:
        return sys.stdin.buffer
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.open(name))
    if name.endswith(".xz"):
        return lzma.open(name)
    if name.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(Path(name).open("rb"), closefd=True))
    return Path(name).open("rb")
