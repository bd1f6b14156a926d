"""Input files by path, glob or URL: what kind each one is, its size, and its bytes without the compression."""

from __future__ import annotations

import bz2
import glob
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import IO, Any

from megatron_slm.config.paths import expand_user
from megatron_slm.runtime.console import warn
from megatron_slm.runtime.errors import ConfigError

STDIN = "-"
STEP = 1 << 16  # bytes that are read from a file at once
OTHER_FORMATS = (".csv", ".tsv", ".xls", ".xlsx", ".avro", ".orc", ".warc", ".html", ".xml", ".pdf", ".bin", ".idx")
PACKED = (".zip", ".tar", ".tgz", ".7z", ".lz4", ".rar", ".br", ".lzo", ".lzma", ".z")  # not read here


class DamagedFile(Exception):
    """A file that is cut short, or that is not what its name says."""


class Form(StrEnum):
    """How documents stand in a file."""

    JSON = "lines of JSON"
    PARAGRAPHS = "texts between blank lines"
    WHOLE = "one text"
    TABLE = "rows of a table"


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
    ".zstd": _zstd,
}
PARQUET = (".parquet", ".pq")
TABLES = (*PARQUET, ".arrow", ".feather")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8
FOREIGN_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    *((mark, "UTF-16") for mark in (b"{\0", b"\0{")),  # lines of JSON without a byte-order mark
)
PACKED_MARKS = (
    (b"\x1f\x8b", ".gz"),
    (b"BZh91AY&SY", ".bz2"),
    (b"\xfd7zXZ", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"PK\x03\x04", ".zip"),
    (b"PAR1\x15", ".parquet"),
    (b"ARROW1\0\0", ".arrow"),
)


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """Return the files named by paths, globs and URLs, in the order given, each glob sorted.

    A file that is named or matched twice is read once, with a warning.

    Raises:
        ConfigError: one that names nothing, a folder, a file that may not be read, or a kind that is not known.
    """
    found: dict[str, str] = {}  # name by the file that it leads to
    for pattern in patterns:
        names = _matches(pattern)
        if not names:
            raise ConfigError(f"--input {pattern}: there is no such file, and no file matches it.")
        for name in names:
            _check_name(name)
            file = name if name == STDIN or is_remote(name) else str(Path(name).resolve())
            if file in found:
                warn(f"--input {pattern} names {found[file]} again; it is read once.")
            found.setdefault(file, name)
    return list(found.values())


def _matches(pattern: str) -> list[str]:
    if pattern == STDIN:
        return [pattern]
    if is_remote(pattern):
        return _remote_matches(pattern)
    pattern = str(expand_user(pattern.removeprefix("file://")))
    if Path(pattern).is_dir():
        raise ConfigError(f"--input {pattern} is a folder. Name its files: '{pattern.rstrip('/')}/*.jsonl'.")
    if Path(pattern).exists():
        return [pattern]
    return sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())


def _check_name(name: str) -> None:
    suffix = suffix_of(name)
    if suffix in PACKED:
        raise ConfigError(
            f"--input {name}: {suffix} files are not read. Unpack it, or compress its files by "
            f"{', '.join(DECOMPRESSORS)}."
        )
    inner = suffix_of(name[: -len(suffix)]) if suffix in DECOMPRESSORS else suffix
    if inner in OTHER_FORMATS:
        raise ConfigError(
            f"--input {name}: {inner} files are not read. Convert it to lines of JSON (.jsonl), one object a document, "
            "or to Parquet."
        )
    if suffix in DECOMPRESSORS and inner in TABLES:
        raise ConfigError(f"--input {name}: unpack it; tables are read as they are (they are compressed inside).")
    if name != STDIN and not is_remote(name) and not os.access(name, os.R_OK):
        raise ConfigError(f"--input {name} may not be read by this user. Look at its permissions (ls -l).")


def is_remote(name: str) -> bool:
    """Is it a URL that fsspec opens (s3://, gs://, hdfs://, memory://, ...)?"""
    return "://" in name and not name.startswith("file://")


def suffix_of(name: str) -> str:
    """Return the last suffix of a name, in lower case."""
    return PurePosixPath(name).suffix.lower()


def compression(name: str) -> str | None:
    """Return the suffix of a compressed file, in lower case, or None."""
    suffix = suffix_of(name)
    return suffix if suffix in DECOMPRESSORS else None


def form_of(name: str, text_document: str = "paragraph") -> Form:
    """How documents stand in a file, from its name; ``text_document`` tells of .txt files, "paragraph" or "file"."""
    packed = compression(name) or ""
    suffix = suffix_of(name[: len(name) - len(packed)])
    if suffix in TABLES:
        return Form.TABLE
    if suffix == ".txt":
        return Form.WHOLE if text_document == "file" else Form.PARAGRAPHS
    return Form.JSON


def check_encoding(begin: bytes) -> None:
    """Raise DamagedFile if the first bytes of a text file are those of UTF-16, UTF-32, or of no text."""
    for mark, name in FOREIGN_MARKS:
        if begin.startswith(mark):
            raise DamagedFile(f"{name} text, not UTF-8. Convert it: iconv -f {name} -t UTF-8")
    for mark, suffix in PACKED_MARKS:
        if begin.startswith(mark):
            raise DamagedFile(f"a {suffix} file by its content. Name it so, or unpack it (standard input, before)")


def is_seekable(name: str) -> bool:
    """Can any worker read any part of it for itself: a plain file on a local disk?"""
    return name != STDIN and not is_remote(name) and compression(name) is None and Path(name).is_file()


def size_of(name: str) -> int:
    """Bytes of a file as it lies there."""
    if is_remote(name):
        filesystem, path = _filesystem(name)
        return int(_asking(name, lambda: filesystem.size(path)) or 0)
    return Path(name).stat().st_size


def total_bytes(names: Sequence[str]) -> int | None:
    """Bytes of all files as they lie there; None where standard input is among them."""
    return None if STDIN in names else sum(map(size_of, names))


def identity_of(name: str) -> str:
    """A text that differs when a file has been changed: size and time of a local file, fsspec's key of another."""
    if is_remote(name):
        filesystem, path = _filesystem(name)
        return str(_asking(name, lambda: filesystem.ukey(path)))
    status = Path(name).stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


def open_input(name: str) -> IO[bytes]:
    """The bytes of a file as they lie there."""
    if name == STDIN:
        return sys.stdin.buffer
    if is_remote(name):
        filesystem, path = _filesystem(name)
        stream: IO[bytes] = _asking(name, lambda: filesystem.open(path, "rb"))
        return stream
    return Path(name).open("rb")


def chunks(name: str) -> Iterator[tuple[bytes, int]]:
    """(bytes without the compression, bytes of the file that they took), piece by piece.

    The pieces depend on the file alone, so that what stands before a damage is the same whenever it is read.

    Raises:
        DamagedFile: the file ends in the midst of its compressed data, or that data is broken.
        OSError: it cannot be read.
    """
    suffix = compression(name)
    with open_input(name) as raw:
        pieces = iter(lambda: raw.read(STEP), b"")
        if suffix is None:
            for data in pieces:
                yield data, len(data)
            return
        try:
            yield from _decompressed(pieces, DECOMPRESSORS[suffix])
        except (zlib.error, lzma.LZMAError) as error:
            raise DamagedFile(f"not whole {suffix} data ({error})") from error
        except Exception as error:  # ZstdError, without importing zstandard; bz2 raises bare OSError and ValueError
            if type(error).__name__ != "ZstdError" and not (suffix == ".bz2" and not getattr(error, "errno", None)):
                raise
            raise DamagedFile(f"not whole {suffix} data ({error})") from error


def _decompressed(pieces: Iterator[bytes], start: Callable[[], Any]) -> Iterator[tuple[bytes, int]]:
    """One member after the other, as gzip, xz and zstd files may hold several."""
    member, has_begun = start(), False
    for piece in pieces:
        taken, rest = len(piece), piece
        while rest:
            if member.eof:
                rest = rest.lstrip(b"\0")  # padding between members
                if not rest:
                    break
                member = start()
            data, has_begun = member.decompress(rest), True
            rest = member.unused_data if member.eof else b""
            if data or taken:
                yield data, taken
            taken = 0
    if has_begun and not member.eof:
        raise DamagedFile("cut short in the midst of its compressed data")


def _remote_matches(pattern: str) -> list[str]:
    filesystem, path = _filesystem(pattern)
    if _asking(pattern, lambda: filesystem.isfile(path)):
        return [pattern]
    found = sorted(_asking(pattern, lambda: filesystem.glob(path)))
    return [filesystem.unstrip_protocol(name) for name in found if filesystem.isfile(name)]


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(f"--input {url}: URLs are read by fsspec. Run 'pip install fsspec'.") from error
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(protocol)
        remedy = f"Run 'pip install {package}'." if package else f"fsspec says: {error}."
        raise ConfigError(f"--input {url}: the package that reads {protocol}:// is not installed. {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"--input {url}: {protocol}:// is no protocol that fsspec knows.") from error
    except Exception as error:  # each file system has its own errors of connections and credentials
        raise _unreachable(url, error) from error


def _asking(url: str, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception as error:  # as above
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> ConfigError:
    first = (str(error).splitlines() or [""])[0]
    return ConfigError(
        f"--input {url} cannot be reached: {first or type(error).__name__}. Look at the address and the credentials."
    )


def read_range(name: str, begin: int, end: int) -> bytes:
    """Bytes of a local file.

    Raises:
        ConfigError: the file has become shorter.
    """
    with Path(name).open("rb", buffering=0) as file:
        file.seek(begin)
        data = io.BufferedReader(file, STEP).read(end - begin)
    if len(data) != end - begin:
        raise ConfigError(f"--input {name} has become shorter while it was read. Begin anew when it is complete.")
    return data
