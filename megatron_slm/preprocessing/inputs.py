"""Input files given by path, glob or URL: format, size, and decompressed content."""

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
READ_BYTES = 1 << 16  # bytes per read call
OTHER_FORMATS = (".csv", ".tsv", ".xls", ".xlsx", ".avro", ".orc", ".warc", ".html", ".xml", ".pdf", ".bin", ".idx")
PACKED = (".zip", ".tar", ".tgz", ".7z", ".lz4", ".rar", ".br", ".lzo", ".lzma", ".z")  # unsupported archives


class DamagedFile(Exception):
    """Raised if a file is truncated, or if its content does not match its suffix."""


class InputFormat(StrEnum):
    """Enumerate the formats of input files."""

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
    """Return the files that match paths, globs and URLs, in the given order, with each glob sorted.

    Duplicates are read once, with a warning.

    Raises:
        ConfigError: a pattern matches nothing or a directory, or a file is unreadable or of an unsupported format.
    """
    found: dict[str, str] = {}  # name by resolved path
    for pattern in patterns:
        names = _matches(pattern)
        if not names:
            raise ConfigError(f"--input {pattern}: no such file.")
        for name in names:
            _check_name(name)
            file = name if name == STDIN or is_remote(name) else str(Path(name).resolve())
            if file in found:
                warn(f"--input {pattern} repeats {found[file]}, which is read once.")
            found.setdefault(file, name)
    return list(found.values())


def _matches(pattern: str) -> list[str]:
    if pattern == STDIN:
        return [pattern]
    if is_remote(pattern):
        return _remote_matches(pattern)
    pattern = str(expand_user(pattern.removeprefix("file://")))
    if Path(pattern).is_dir():
        raise ConfigError(f"--input {pattern} is a directory. Use a glob: '{pattern.rstrip('/')}/*.jsonl'.")
    if Path(pattern).exists():
        return [pattern]
    return sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())


def _check_name(name: str) -> None:
    suffix = suffix_of(name)
    if suffix in PACKED:
        raise ConfigError(
            f"--input {name}: {suffix} files are not supported. Unpack it; files may be compressed as "
            f"{', '.join(DECOMPRESSORS)}."
        )
    inner = suffix_of(name[: -len(suffix)]) if suffix in DECOMPRESSORS else suffix
    if inner in OTHER_FORMATS:
        raise ConfigError(
            f"--input {name}: {inner} files are not supported. Convert it to JSON lines (.jsonl, one object per "
            "document) or Parquet."
        )
    if suffix in DECOMPRESSORS and inner in TABLES:
        raise ConfigError(f"--input {name}: compressed tables are not supported. Unpack it.")
    if name != STDIN and not is_remote(name) and not os.access(name, os.R_OK):
        raise ConfigError(f"--input {name} cannot be read: permission denied. Check its permissions (ls -l).")


def is_remote(name: str) -> bool:
    """Return whether a name is a URL for fsspec (s3://, gs://, hdfs://, memory://, ...)."""
    return "://" in name and not name.startswith("file://")


def suffix_of(name: str) -> str:
    """Return the last suffix of a name, in lower case."""
    return PurePosixPath(name).suffix.lower()


def compression(name: str) -> str | None:
    """Return the compression suffix of a file in lower case, or None."""
    suffix = suffix_of(name)
    return suffix if suffix in DECOMPRESSORS else None


def detect_format(name: str, text_document: str = "paragraph") -> InputFormat:
    """Return the format of a file from its suffix; a document of a .txt file is a "paragraph" or the "file"."""
    packed = compression(name) or ""
    suffix = suffix_of(name[: len(name) - len(packed)])
    if suffix in TABLES:
        return InputFormat.TABLE
    if suffix == ".txt":
        return InputFormat.WHOLE if text_document == "file" else InputFormat.PARAGRAPHS
    return InputFormat.JSON


def check_encoding(begin: bytes, remedy: str = "Rename it, or unpack it (also for standard input)") -> None:
    """Raise DamagedFile if a text file starts with the mark of UTF-16, UTF-32 or a binary format.

    Args:
        remedy: of a file in a binary format.
    """
    for mark, name in FOREIGN_MARKS:
        if begin.startswith(mark):
            raise DamagedFile(f"{name} text, not UTF-8. Convert it: iconv -f {name} -t UTF-8")
    for mark, suffix in PACKED_MARKS:
        if begin.startswith(mark):
            raise DamagedFile(f"a {suffix} file by its content. {remedy}")


def is_seekable(name: str) -> bool:
    """Return whether workers can read byte ranges: whether it is an uncompressed local file."""
    return name != STDIN and not is_remote(name) and compression(name) is None and Path(name).is_file()


def input_size(name: str) -> int:
    """Return the size of a file on disk, in bytes."""
    if is_remote(name):
        filesystem, path = _filesystem(name)
        return int(_query(name, lambda: filesystem.size(path)) or 0)
    return Path(name).stat().st_size


def total_bytes(names: Sequence[str]) -> int | None:
    """Return the total size of the files on disk, in bytes; None if standard input is among them."""
    return None if STDIN in names else sum(map(input_size, names))


def input_identity(name: str) -> str:
    """Return a string that changes with the file: size and modification time, or the fsspec key of a URL."""
    if is_remote(name):
        filesystem, path = _filesystem(name)
        return str(_query(name, lambda: filesystem.ukey(path)))
    status = Path(name).stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


def open_input(name: str) -> IO[bytes]:
    """Open a file, without decompression."""
    if name == STDIN:
        return sys.stdin.buffer
    if is_remote(name):
        filesystem, path = _filesystem(name)
        stream: IO[bytes] = _query(name, lambda: filesystem.open(path, "rb"))
        return stream
    return Path(name).open("rb")


def read_decompressed(name: str) -> Iterator[tuple[bytes, int]]:
    """Yield (decompressed bytes, number of bytes read from the file).

    Chunk boundaries depend only on the file, so that the content before any damage is reproducible.

    Raises:
        DamagedFile: the compressed data is truncated or invalid.
        OSError: the file cannot be read.
    """
    suffix = compression(name)
    with open_input(name) as raw:
        pieces = iter(lambda: raw.read(READ_BYTES), b"")
        if suffix is None:
            for data in pieces:
                yield data, len(data)
            return
        try:
            yield from _decompressed(pieces, DECOMPRESSORS[suffix])
        except (zlib.error, lzma.LZMAError) as error:
            raise DamagedFile(f"invalid {suffix} data ({error})") from error
        except Exception as error:  # ZstdError, without importing zstandard; bz2 raises bare OSError and ValueError
            if type(error).__name__ != "ZstdError" and not (suffix == ".bz2" and not getattr(error, "errno", None)):
                raise
            raise DamagedFile(f"invalid {suffix} data ({error})") from error


def _decompressed(pieces: Iterator[bytes], start: Callable[[], Any]) -> Iterator[tuple[bytes, int]]:
    """Decompress all members of a file (gzip, xz and zstd files may have several)."""
    member, has_started = start(), False
    for piece in pieces:
        taken, rest = len(piece), piece
        while rest:
            if member.eof:
                rest = rest.lstrip(b"\0")  # padding between members
                if not rest:
                    break
                member = start()
            data, has_started = member.decompress(rest), True
            rest = member.unused_data if member.eof else b""
            if data or taken:
                yield data, taken
            taken = 0
    if has_started and not member.eof:
        raise DamagedFile("truncated within its compressed data")


def _remote_matches(pattern: str) -> list[str]:
    filesystem, path = _filesystem(pattern)
    if _query(pattern, lambda: filesystem.isfile(path)):
        return [pattern]
    found = sorted(_query(pattern, lambda: filesystem.glob(path)))
    return [filesystem.unstrip_protocol(name) for name in found if filesystem.isfile(name)]


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it."""
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(f"--input {url}: URLs require fsspec. Run 'pip install fsspec'.") from error
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(protocol)
        remedy = f"Run 'pip install {package}'." if package else f"{error}."
        raise ConfigError(f"--input {url}: the package for {protocol}:// is not installed. {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"--input {url}: fsspec does not support the protocol {protocol}://.") from error
    except Exception as error:  # connection and credential errors differ between file systems
        raise _unreachable(url, error) from error


def _query(url: str, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception as error:  # as above
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> ConfigError:
    first = (str(error).splitlines() or [""])[0]
    return ConfigError(
        f"--input {url} cannot be reached: {first or type(error).__name__}. Check the address and the credentials."
    )


def read_range(name: str, begin: int, end: int) -> bytes:
    """Return the bytes [begin, end) of a local file.

    Raises:
        ConfigError: the file was truncated in the meantime.
    """
    with Path(name).open("rb", buffering=0) as file:
        file.seek(begin)
        data = io.BufferedReader(file, READ_BYTES).read(end - begin)
    if len(data) != end - begin:
        raise ConfigError(f"--input {name} was truncated while it was read. Restart when it is complete.")
    return data
