"""Append records to files, devices and pipes: no partial records, and no loss during a temporary failure."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_slm.runtime.files import explained_write

MAX_WAITING = 10_000  # records buffered in memory during a failure
NOT_APPENDABLE = "it is not a file, a character device or a pipe"
_STANDARD = {"/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"(?:/dev|/proc/self)/fd/(\d+)")


class AppendFile:
    """Append-only regular file, character device, pipe or standard stream.

    Args:
        path: path of the file; its directory is created if needed.
        flag: flag that names the file, for error messages.

    Raises:
        ConfigError: the file cannot be opened. A pipe without a reader is not an error.
    """

    def __init__(self, path: Path, flag: str) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._remainder = b""  # of a record that a pipe accepted in part
        with explained_write(path, flag):
            if not is_stream(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except OSError as error:
                if not (error.errno == errno.ENXIO and path.is_fifo()):
                    raise

    def append(self, record: bytes) -> None:
        """Append ``record``.

        Raises:
            OSError: nothing was written; a later call may succeed.
        """
        try:
            descriptor = self._open()
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and not is_stream(self.path):
                _append_completely(descriptor, record)
            else:
                self._append_to_stream(descriptor, record)
        except OSError:
            self.close()
            raise

    def _append_to_stream(self, descriptor: int, record: bytes) -> None:
        if self._remainder:
            self._remainder = self._remainder[os.write(descriptor, self._remainder) :]
            if self._remainder:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._remainder = record[os.write(descriptor, record) :]

    def _open(self) -> int:
        if self._descriptor is not None and not os.fstat(self._descriptor).st_nlink:
            self.close()  # deleted, or moved away by a log rotation
        if self._descriptor is None:
            self._descriptor = _open(self.path)
        return self._descriptor

    def close(self) -> None:
        """Close the file; a later :meth:`append` opens it again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):  # of delayed writes, on a network file system
                os.close(descriptor)


def _append_completely(descriptor: int, record: bytes) -> None:
    size = os.fstat(descriptor).st_size
    try:
        while record:
            record = record[os.write(descriptor, record) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def is_stream(path: Path) -> bool:
    """Return whether ``path`` is a device, pipe or standard stream, which has no content to keep or drop."""
    return _standard_descriptor(path) is not None or (path.exists() and not path.is_file())


def can_be_appended_to(path: Path) -> bool:
    """Return whether ``path`` supports appending; directories, block devices and sockets do not."""
    return not (path.is_dir() or path.is_block_device() or path.is_socket())


def _standard_descriptor(path: Path) -> int | None:
    match = _DESCRIPTOR.fullmatch(str(path))
    return int(match.group(1)) if match else _STANDARD.get(str(path))


def _open(path: Path) -> int:
    standard = _standard_descriptor(path)
    if standard is not None:
        return os.dup(standard)  # shares its position with the other output of the program
    if not can_be_appended_to(path):
        raise OSError(errno.EINVAL, NOT_APPENDABLE)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
    if is_stream(path):
        flags |= os.O_NONBLOCK  # a pipe without a reader must not block the run
    return os.open(path, flags, 0o666)


class PatientWriter:
    """Append records to a file, buffering them in memory during a failure.

    Args:
        file: file to append to.
        flag: flag that names the file, for warnings.
        warn: function called with a line when writing starts to fail and when it recovers.
    """

    def __init__(self, file: AppendFile, flag: str, warn: Callable[[str], None]) -> None:
        self._file = file
        self._name = f"{flag} {file.path}"
        self._warn = warn
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._is_failing = False

    def write(self, record: bytes) -> None:
        """Write the record after all buffered ones."""
        self._waiting.append(record)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._dropped += 1
        self._drain()

    def close(self) -> None:
        """Write all buffered records and report lost ones."""
        self._drain()
        lost = len(self._waiting) + self._dropped
        if lost:
            self._warn(f"{self._name}: {lost:,} records were not written.")
            self._waiting.clear()
        self._dropped, self._is_failing = 0, False
        self._file.close()

    def _drain(self) -> None:
        count = len(self._waiting)
        try:
            while self._waiting:
                self._file.append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._is_failing:
                self._is_failing = True
                self._warn(
                    f"{self._name} cannot be written ({error.strerror or error}). The run continues; up to "
                    f"{MAX_WAITING:,} records are buffered in memory."
                )
            return
        if self._is_failing:
            self._is_failing = False
            self._warn(f"{self._name} is writable again: {count:,} buffered records written, {self._dropped:,} lost.")
            self._dropped = 0
