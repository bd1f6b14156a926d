"""Atomic appending of records, with buffering during failures."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_slm.runtime import append
from megatron_slm.runtime.append import AppendFile, PatientWriter
from megatron_slm.runtime.errors import ConfigError


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make writes beyond ``size`` bytes of a file fail in the middle of a record, as on a full disk."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, ignored)


def patient(path: Path) -> tuple[PatientWriter, list[str]]:
    warnings: list[str] = []
    return PatientWriter(AppendFile(path, "--flag"), "--flag", warnings.append), warnings


def test_records_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    writer, warnings = patient(path)
    writer.write(b"first\n")
    with largest_file(9):
        writer.write(b"second\n")
        writer.write(b"third\n")
        assert path.read_bytes() == b"first\n"  # no half record
        assert len(warnings) == 1 and f"--flag {path} cannot be written (File too large)" in warnings[0]
    writer.write(b"fourth\n")
    writer.close()
    assert path.read_bytes() == b"first\nsecond\nthird\nfourth\n"
    assert len(warnings) == 2 and "3 buffered records written, 0 lost" in warnings[1]


def test_records_that_are_lost_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "MAX_WAITING", 2)
    writer, warnings = patient(Path("/dev/full"))
    for _ in range(5):
        writer.write(b"record\n")
    writer.close()
    assert "No space left on device" in warnings[0]
    assert warnings[1:] == ["--flag /dev/full: 5 records were not written."]


def test_a_file_that_is_deleted_or_whose_directory_is_missing_for_a_time_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "directory" / "file"
    writer, warnings = patient(path)
    writer.write(b"1\n")
    path.unlink()
    path.parent.rmdir()
    writer.write(b"2\n")
    path.parent.mkdir()
    writer.write(b"3\n")
    writer.close()
    assert path.read_bytes() == b"2\n3\n"
    assert "No such file or directory" in warnings[0]


def test_a_pipe_is_written_when_a_reader_is_there(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer, warnings = patient(path)  # does not block
    writer.write(b"1\n")
    assert len(warnings) == 1
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer.write(b"2\n")
    assert os.read(reader, 100) == b"1\n2\n"
    os.close(reader)
    writer.write(b"3\n")
    assert len(warnings) == 3  # fails and warns again
    writer.close()
    assert path.is_fifo()


def test_a_pipe_that_is_full_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer, _ = patient(path)
    lines = [b"%07d" % number + b"x" * 10_000 + b"\n" for number in range(20)]
    for line in lines:
        writer.write(line)
    read = b""
    for _ in range(100):
        try:
            read += os.read(reader, 1 << 20)
        except BlockingIOError:
            break
        writer.write(b"")
    os.close(reader)
    assert read == b"".join(lines)


def test_standard_streams_keep_their_position(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A redirected stream has an offset; reopening its file would overwrite earlier output."""
    writer, _ = patient(Path("/dev/stdout"))
    os.write(1, b"before\n")
    writer.write(b"record\n")
    os.write(1, b"after\n")
    writer.close()
    assert capfd.readouterr().out == "before\nrecord\nafter\n"


@pytest.mark.parametrize("name", ["directory", "file/below"])
def test_places_that_cannot_be_appended_to_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"--flag {tmp_path / name} cannot be written"):
        AppendFile(tmp_path / name, "--flag")
