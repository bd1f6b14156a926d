"""Parallel, resumable writing of a score sidecar.

The file is allocated in full under a temporary name, and every process writes the codes of its tokens to their
positions. At intervals all processes flush to disk, and then rank 0 records the progress, from which a resumed job
continues. Rank 0 holds a lock on the temporary file, which is renamed on completion.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.runtime.checksums import file_checksums
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_replaceable, explained_write, publish, write_text
from megatron_slm.scores.quantization import DTYPE
from megatron_slm.scores.sidecar import FLAG, HEADER_BYTES, ScoresHeader, partial_path, read_header


@dataclass(frozen=True)
class Progress:
    """Scoring progress: all rows of the chunks before ``chunk``, and ``rows`` rows of ``chunk``."""

    chunk: int = 0
    rows: int = 0
    clamped: int = 0  # number of losses above the ceiling
    tokens: int = 0  # scored tokens

    @staticmethod
    def read(record: Path) -> Progress | None:
        """Return the recorded progress, or None if the record is missing or damaged."""
        try:
            found = json.loads(record.read_text(encoding="ascii"))
            return Progress(**{field.name: int(found[field.name]) for field in fields(Progress)})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def is_finished(path: Path, header: ScoresHeader) -> bool:
    """Return whether ``path`` is the complete sidecar of this job; the former one-byte format does not count.

    Raises:
        ConfigError: the sidecar is damaged or was made by another job.
    """
    if not path.is_file():
        return False
    existing = read_header(path)
    _check_same_job(path, existing, header)
    if existing.bytes_per_value != header.bytes_per_value:
        return False
    _record_path(path).unlink(missing_ok=True)  # left by a job that was killed after the rename
    return True


@contextmanager
def reserved(path: Path, header: ScoresHeader) -> Iterator[Progress]:
    """Reserve the temporary file of a sidecar for this job, and yield its recorded progress. Collective.

    Raises:
        ConfigError: another process writes the sidecar, the disk is full, the directory cannot be written, or another
            job left an unfinished sidecar; on every rank.
    """
    locks: list[int] = []
    try:
        yield on_first_rank(lambda: _reserve(path, header, locks))
    finally:
        for descriptor in locks:
            os.close(descriptor)


class SidecarWriter:
    """Write access of one process to the temporary file of a :func:`reserved` sidecar."""

    def __init__(self, path: Path, header: ScoresHeader) -> None:
        self.partial, self.header = partial_path(path), header
        self.file = os.open(self.partial, os.O_RDWR)

    def write_losses(self, start: int, codes: NDArray[np.uint16]) -> None:
        """Write the codes of the losses of the tokens from position ``start`` on."""
        self._write(HEADER_BYTES + start * DTYPE.itemsize, codes)

    def write_entropies(self, start: int, codes: NDArray[np.uint16]) -> None:
        """Write the codes of the entropies of the tokens from position ``start`` on."""
        self._write(self.header.entropy_start + start * DTYPE.itemsize, codes)

    def _write(self, offset: int, codes: NDArray[np.uint16]) -> None:
        data = memoryview(codes.tobytes())
        with explained_write(self.partial, FLAG, _remedy(self.header)):
            while data:
                written = os.pwrite(self.file, data, offset)
                data, offset = data[written:], offset + written

    def sync(self) -> None:
        """Flush all writes of this process to disk."""
        with explained_write(self.partial, FLAG, _remedy(self.header)):
            os.fsync(self.file)

    def close(self) -> None:
        os.close(self.file)


def record_progress(path: Path, progress: Progress) -> None:
    """Record that all data up to ``progress`` is on disk."""
    write_text(_record_path(path), json.dumps(asdict(progress)), FLAG)


def content_checksum(path: Path) -> str:
    """Return the checksum of the content of the temporary file, without the header. Collective over all ranks."""
    return file_checksums([partial_path(path)], FLAG, start=HEADER_BYTES, just_written=True)[0]


def finish(path: Path, header: ScoresHeader, progress: Progress, checksum: str) -> ScoresHeader:
    """Write and return the final header, rename the file to its final name, and remove the progress record."""
    final = replace(header, clamped=progress.clamped, complete=True, checksum=checksum)
    partial = partial_path(path)
    with explained_write(partial, FLAG, _remedy(header)):
        with partial.open("r+b") as file:
            file.write(final.pack())
        publish(partial, path)
        _record_path(path).unlink(missing_ok=True)
    return final


def _reserve(path: Path, header: ScoresHeader, locks: list[int]) -> Progress:
    """Reserve the temporary file and return its progress; the descriptor in ``locks`` holds its lock until closed."""
    partial = partial_path(path)
    for each in (path, partial, _record_path(path)):
        check_replaceable(each, FLAG)
    with explained_write(partial, FLAG, _remedy(header)):
        path.parent.mkdir(parents=True, exist_ok=True)
        locks.append(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666))
        _lock(locks[0], partial)
        found = _find_progress(path, header)
        if found is None:
            _begin(path, header, locks[0])
    return found or Progress()


def _lock(descriptor: int, partial: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())  # not finished just now
    except OSError as error:
        is_free = error.errno not in (errno.EACCES, errno.EAGAIN)  # else a file system without locks
    if not is_free:
        raise ConfigError(f"{FLAG}: another process writes {partial}. Wait for it, or choose another name with {FLAG}.")


def _find_progress(path: Path, header: ScoresHeader) -> Progress | None:
    """Return the progress of an interrupted job, or None if there is nothing to continue.

    Raises:
        ConfigError: another job left an unfinished sidecar.
    """
    partial, progress = partial_path(path), Progress.read(_record_path(path))
    with partial.open("rb") as file:
        block = file.read(HEADER_BYTES)
    if progress is None or not block:
        return None
    try:
        existing = ScoresHeader.unpack(block)
    except ValueError as error:
        raise ConfigError(f"{FLAG}: {partial} {error}. Remove it to score from the start.") from error
    _check_same_job(partial, existing, header)
    return progress if existing.bytes_per_value == header.bytes_per_value else None


def _begin(path: Path, header: ScoresHeader, descriptor: int) -> None:
    """Allocate the disk space and write the header; a full disk leaves no files."""
    record = _record_path(path)
    record.unlink(missing_ok=True)
    try:
        os.ftruncate(descriptor, 0)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, header.file_bytes)
        else:  # macOS lacks posix_fallocate, and detects a full disk later
            os.ftruncate(descriptor, header.file_bytes)
        os.pwrite(descriptor, header.unfinished().pack(), 0)
        os.fsync(descriptor)
        record_progress(path, Progress())
    except (OSError, ConfigError):
        partial_path(path).unlink(missing_ok=True)
        raise


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.progress")


def _check_same_job(path: Path, existing: ScoresHeader, ours: ScoresHeader) -> None:
    """Raise ConfigError if a sidecar was made by another job, as far as its format records that."""
    found, wanted = asdict(existing.unfinished()), asdict(ours.unfinished())
    ignored = {"bytes_per_value"}
    if existing.eod is None:
        ignored.add("eod")
    if existing.bytes_per_value != ours.bytes_per_value:
        ignored.add("entropy")  # the sidecar is replaced
    for name, value in found.items():
        if name not in ignored and value != wanted[name]:
            raise ConfigError(
                f"{FLAG}: {path} was made with another {name}: {value}; this job has {wanted[name]}. "
                f"Remove it, or choose another name with {FLAG}."
            )


def _remedy(header: ScoresHeader) -> str:
    return f"The sidecar takes {header.file_bytes:,} bytes; {FLAG} DIRECTORY/NAME writes it to another directory."
