"""Log files: one per rank, with time and rank of each event, to locate slow, hanging or failing ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_slm.runtime.append import AppendFile, PatientWriter
from megatron_slm.runtime.console import warn

FLAG = "--slm-log-dir"
LOGGER = logging.getLogger("megatron_slm")
LIBRARIES = ("megatron", "torch", "py.warnings")  # recorded from WARNING upwards
FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"


class _RankFile(logging.Handler):
    """Append records to a file. A full disk delays them, and is reported once."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._writer = PatientWriter(AppendFile(path, FLAG), FLAG, warn)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = f"{self.format(record)}\n"
        except Exception:  # arguments that do not fit a library's message
            self.handleError(record)
        else:
            self._writer.write(line.encode(errors="backslashreplace"))

    def close(self) -> None:
        self._writer.close()
        super().close()


def open_log(directory: str | None, rank: int) -> logging.Handler | None:
    """Open ``directory/rank_NNNNN.log`` for appending, creating the directory if needed; None if ``directory`` is.

    Raises:
        ConfigError: the file cannot be created.
    """
    if directory is None:
        return None
    handler = _RankFile(Path(directory) / f"rank_{rank:05d}.log")
    handler.setFormatter(logging.Formatter(FORMAT.format(rank=rank)))
    return handler


@contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Suppress warnings of loggers within the block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def logging_to(handler: logging.Handler | None) -> Iterator[None]:
    """Write the log records of the block and its error, if any, to ``handler``, then close it."""
    if handler is None:
        yield
        return
    loggers = [LOGGER, *map(logging.getLogger, LIBRARIES)]
    level = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except BaseException:
        LOGGER.exception("ended by an error")
        raise
    finally:
        LOGGER.setLevel(level)
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
