"""Log files of ranks: time, rank, library warnings, the final error of a run, and full disks."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from megatron_slm.runtime import append
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.logs import logging_to, open_log

LOGGER = logging.getLogger("megatron_slm.somewhere")


def test_records_have_time_and_rank(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with logging_to(open_log(str(tmp_path / "logs"), 3)):
            LOGGER.info(text)
            LOGGER.debug("detail")
            logging.getLogger("megatron.core").warning("a library's warning")
    LOGGER.warning("after the block")
    lines = (tmp_path / "logs" / "rank_00003.log").read_text().splitlines()
    assert [line.partition("somewhere: ")[2] for line in lines[::2]] == ["first", "second"]
    assert lines[0][:2] == "20" and " rank 3 INFO megatron_slm.somewhere: " in lines[0]
    assert lines[1].endswith("rank 3 WARNING megatron.core: a library's warning") and len(lines) == 4


def test_the_error_that_ends_the_block_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reason"), logging_to(open_log(str(tmp_path), 0)):
        raise ValueError("reason")
    text = (tmp_path / "rank_00000.log").read_text()
    assert "ended by an error" in text and "Traceback" in text and "ValueError: reason" in text


def test_nothing_is_recorded_without_a_directory() -> None:
    with logging_to(open_log(None, 0)):
        assert not LOGGER.isEnabledFor(logging.INFO)


def test_a_file_that_cannot_be_created_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--slm-log-dir"):
        open_log(str(tmp_path / "file" / "logs"), 0)


@pytest.mark.parametrize("recovers", [False, True])
def test_a_full_disk_is_reported_once_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, recovers: bool
) -> None:
    write = os.write
    handler = open_log(str(tmp_path), 0)
    assert handler is not None

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with logging_to(handler):
        LOGGER.info("first")
        monkeypatch.setattr(append.os, "write", full)
        handler.handle(logging.makeLogRecord({"msg": "not a number: %d", "args": ("text",)}))
        for number in range(3):
            # not by a logger: pytest-xdist cannot send captured records with lone surrogates
            handler.handle(logging.makeLogRecord({"msg": "record %d \udcff", "args": (number,)}))
        if recovers:
            monkeypatch.setattr(append.os, "write", write)
    monkeypatch.setattr(append.os, "write", write)
    handler.close()  # as at the end of the process
    errors, lines = capsys.readouterr().err, (tmp_path / "rank_00000.log").read_text().splitlines()
    assert errors.count("--slm-log-dir") == 2 and "rank_00000.log cannot be written (No space left" in errors
    assert ("is writable again" if recovers else "3 records were not written") in errors
    assert len(lines) == (4 if recovers else 1)
