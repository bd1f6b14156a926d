"""Atomic file writes: temporary file in the same directory, fsync, rename, and a uniform error message.

A reader sees the previous or the complete new file, even after a crash or on a full disk. Only regular files are
replaced; with ``is_ours``, only those that the predicate accepts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_slm.runtime.errors import ConfigError

IsOurs = Callable[[Path], bool]
LONGEST_TAIL = 50  # characters of a path in its temporary name, which must not be too long if the path is not

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


@contextmanager
def atomic_path(path: str | Path, role: str = "the file", *, is_ours: IsOurs | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to; publish it as ``path`` when the block ends without an error.

    The temporary name keeps the suffix of ``path``, by which libraries choose a format. A symbolic link is followed:
    its target is replaced, and an existing file keeps its permissions.

    Args:
        path: final path, in an existing directory.
        role: flag or role of the file, which prefixes every error message, for example ``--output``.
        is_ours: returns whether an existing file may be replaced; None accepts any regular file.

    Raises:
        ConfigError: ``path`` cannot be replaced or written; an existing file is unchanged.
    """
    target = Path(path).resolve()
    check_replaceable(target, role, is_ours=is_ours)
    temporary = target.with_name(f".partial-{uuid.uuid4().hex[:8]}-{Path(path).name[-LONGEST_TAIL:]}")
    try:
        with explained_write(path, role):
            yield temporary
            if target.exists():
                shutil.copymode(target, temporary)
            publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def publish(partial: Path, path: Path) -> None:
    """Flush a complete file, rename it to its final path, and flush the directory.

    Raises:
        OSError: the file cannot be flushed or renamed; :func:`explained_write` explains it.
    """
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def write_text(path: str | Path, text: str, role: str = "the file", *, is_ours: IsOurs | None = None) -> None:
    """Write ``text`` to ``path`` in UTF-8, atomically. Arguments and errors as in :func:`atomic_path`."""
    write_bytes(path, text.encode("utf-8"), role, is_ours=is_ours)


def write_bytes(path: str | Path, data: bytes, role: str = "the file", *, is_ours: IsOurs | None = None) -> None:
    """Write ``data`` to ``path`` atomically. Arguments and errors as in :func:`atomic_path`."""
    with atomic_path(path, role, is_ours=is_ours) as temporary:
        temporary.write_bytes(data)


def check_replaceable(path: str | Path, role: str = "the file", *, is_ours: IsOurs | None = None) -> None:
    """Raise ConfigError if ``path`` exists and may not be replaced; call it before long work."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _write_error(path, role, error) from error
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise ConfigError(f"{role} {path} is {name}, which is not replaced. Choose another path.")
    if is_ours is not None and not is_ours(Path(path)):
        raise ConfigError(
            f"{role} {path} exists and was not written by megatron_slm. Choose another path, or remove the file."
        )


def check_output_file(path: str | Path, role: str, *, is_ours: IsOurs | None = None) -> None:
    """Raise ConfigError if ``path`` may not be replaced or cannot be written; call it before long work.

    A trial write shows it: permission bits do not reveal read-only mounts and full disks.
    """
    if str(path) == "-":
        raise ConfigError(f"{role} - is not supported: results are files. Give a path.")
    check_replaceable(path, role, is_ours=is_ours)
    directory = Path(path).resolve().parent
    if not directory.is_dir():
        raise ConfigError(f"{role} {path}: the directory {Path(path).parent} does not exist. Create it.")
    with explained_write(path, role), tempfile.TemporaryFile(dir=directory):
        pass


def lock_output(file: IO[bytes], role: str) -> None:
    """Lock an output file until it is closed; close it and raise ConfigError if another process holds the lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ConfigError(
                f"{role}: another process is writing there ({file.name} is locked). Wait for it, or choose another "
                "path."
            ) from error
        # any other error: the file system does not support locks


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write all of ``data`` to an unbuffered file, repeating partial writes.

    Raises:
        OSError: the disk is full.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def check_regular(path: Path) -> None:
    """Raise OSError unless ``path`` is a regular file, before it is opened: a named pipe would block its reader."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def is_json_of(path: Path, kind: str) -> bool:
    """Return whether a file is a JSON object with this ``kind``, as results of this program are."""
    try:
        check_regular(path)
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("kind") == kind


def check_output_prefix(prefix: str, flag: str, *, directory_allowed: bool = False) -> None:
    """Raise ConfigError if suffixes cannot be appended to an output prefix.

    Args:
        prefix: path to which file suffixes are appended.
        flag: flag that gives the prefix, for error messages.
        directory_allowed: whether a directory with the same name may exist.
    """
    remedy = "Give a path that ends with a file name without suffix, for example out/name."
    if not prefix.strip():
        raise ConfigError(f"{flag} is empty. {remedy}")
    if prefix.endswith(os.sep) or os.path.basename(prefix) in (".", ".."):  # noqa: PTH119 Path drops both
        raise ConfigError(f"{flag} {prefix} names a directory. {remedy}")
    if not directory_allowed and Path(prefix).is_dir():
        raise ConfigError(f"{flag} {prefix} is an existing directory. {remedy}")


@contextmanager
def explained_write(path: str | Path, role: str = "the file", note: str = "") -> Iterator[None]:
    """Convert an OSError of the block into a ConfigError with ``role``, path, reason and remedy.

    Args:
        path: path as given by the user.
        role: flag or role of the file.
        note: last sentence of the message.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(path, role, error, note) from error


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(path: str | Path, role: str, error: OSError, note: str = "") -> ConfigError:
    return ConfigError(
        f"{role} {path} cannot be written: {error.strerror or error}. Free space on the disk, or choose a path that "
        f"this user may write.{' ' if note else ''}{note}"
    )


def free_space(path: Path) -> int | None:
    """Return the free bytes on the disk of ``path``, which need not exist; None if its file system reports none."""
    existing = next((each for each in (path, *path.absolute().parents) if each.exists()), path)
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return None
    return usage.free if usage.total else None


def format_size(size: int) -> str:
    """Format a number of bytes in MiB or GiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
