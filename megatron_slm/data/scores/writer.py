"""Writes a score sidecar from many processes, such that it survives being killed at any moment.

The file is reserved whole under a temporary name. Every process writes its tokens' codes to their own places. From
time to time all of them bring what they wrote to disk, and then one records, by a rename, how far the work is. A job
that is started again goes on from that record and writes again what came after it; the name changes at the end.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.scores.codebooks import Codebooks
from megatron_slm.data.scores.sidecar import FLAG, HEADER_BYTES, ScoresHeader, partial_path, read_header
from megatron_slm.runtime.checksums import file_checksums
from megatron_slm.runtime.errors import ConfigError


@dataclass(frozen=True)
class Progress:
    """How far a job is: all rows of the chunks before ``chunk``, and ``rows`` rows of it."""

    chunk: int = 0
    rows: int = 0
    clamped: int = 0  # losses above the ceiling so far
    tokens: int = 0  # scored so far
    calibrated: bool = False  # the codebooks are in the file


def is_finished(path: Path, header: ScoresHeader) -> bool:
    """Whether ``path`` is already what the job is to make.

    Raises:
        ConfigError: it is the sidecar of another job, or is damaged.
    """
    if not path.is_file():
        return False
    _check_same_job(path, read_header(path), header)
    _record_path(path).unlink(missing_ok=True)  # of a job that was killed after it gave the file its name
    return True


def reserve(path: Path, header: ScoresHeader) -> Progress:
    """Prepare the temporary file, or find the one of a job that was cut short, and tell how far it is.

    Raises:
        ConfigError: no room on the disk, a folder that cannot be written, or an unfinished sidecar of another job.
    """
    partial, record = partial_path(path), _record_path(path)
    try:
        if partial.is_file() and record.is_file():
            _check_same_job(partial, _unpack(partial), header)
            return Progress(**json.loads(record.read_text(encoding="ascii")))
        path.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        with partial.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, header.file_bytes)
            else:  # macOS has none: there a full disk shows itself later
                file.truncate(header.file_bytes)
            file.write(header.unfinished().pack())
            file.flush()
            os.fsync(file.fileno())
        record_progress(path, Progress())
    except OSError as error:
        if not record.is_file():
            partial.unlink(missing_ok=True)
        raise _cannot_write(partial, error, header.file_bytes) from error
    return Progress()


class SidecarWriter:
    """One process's hand on the temporary file that :func:`reserve` made."""

    def __init__(self, path: Path, header: ScoresHeader) -> None:
        self.partial, self.header = partial_path(path), header
        self.file = os.open(self.partial, os.O_RDWR)

    def write_codebooks(self, books: Codebooks) -> None:
        """Put the codebooks of the losses."""
        self._write(HEADER_BYTES, books.starts)

    def write_losses(self, start: int, codes: NDArray[np.unsignedinteger]) -> None:
        """Put the codes of the tokens from place ``start`` on."""
        self._write(self.header.loss_start + start * self.header.loss.bytes, codes)

    def write_entropies(self, start: int, codes: NDArray[np.unsignedinteger]) -> None:
        """The same for entropies."""
        assert self.header.entropy is not None
        self._write(self.header.entropy_start + start * self.header.entropy.bytes, codes)

    def _write(self, offset: int, codes: NDArray[np.unsignedinteger]) -> None:
        data = memoryview(codes.tobytes())
        try:
            while data:
                written = os.pwrite(self.file, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise _cannot_write(self.partial, error, self.header.file_bytes) from error

    def sync(self) -> None:
        """Bring everything that this process wrote to disk."""
        os.fsync(self.file)

    def close(self) -> None:
        os.close(self.file)


def record_progress(path: Path, progress: Progress) -> None:
    """Record that everything up to ``progress`` is on disk."""
    record = _record_path(path)
    partial = record.with_name(f"{record.name}.new")
    with partial.open("w", encoding="ascii") as file:
        json.dump(asdict(progress), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(record)


def content_checksum(path: Path) -> str:
    """Return the checksum of what has been written, the header left out. Collective over all ranks."""
    return file_checksums([partial_path(path)], FLAG, start=HEADER_BYTES, just_written=True)[0]


def finish(path: Path, header: ScoresHeader, progress: Progress, checksum: str) -> ScoresHeader:
    """Write the final header with the content's checksum, give the file its name, and remove the progress record."""
    final = replace(header, clamped=progress.clamped, complete=True, checksum=checksum)
    partial = partial_path(path)
    with partial.open("r+b") as file:
        file.write(final.pack())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _record_path(path).unlink(missing_ok=True)
    return final


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.progress")


def _unpack(path: Path) -> ScoresHeader:
    with path.open("rb") as file:
        block = file.read(HEADER_BYTES)
    try:
        return ScoresHeader.unpack(block)
    except ValueError as error:
        raise ConfigError(f"{path} {error}. Remove it to begin anew.") from error


def _check_same_job(path: Path, theirs: ScoresHeader, ours: ScoresHeader) -> None:
    facts, wanted = asdict(theirs.unfinished()), asdict(ours.unfinished())
    for name, fact in facts.items():
        if fact != wanted[name]:
            raise ConfigError(
                f"{path} is there, and was made with another {name}: {fact}; this job has {wanted[name]}. "
                "Remove it, or choose another name with --reference-scores."
            )


def _cannot_write(path: Path, error: OSError, needed: int) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written: {error.strerror}. It needs {needed:,} bytes in all; "
        "free some space, or name another folder with --reference-scores FOLDER/NAME."
    )
