"""Log files: one per rank, with time and rank of each event, to locate slow, hanging or failing ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_slm.runtime.console import warn
from megatron_slm.runtime.files import explained_write

LOGGER = logging.getLogger("megatron_slm")
LIBRARIES = ("megatron", "torch", "py.warnings")  # recorded from WARNING upwards
FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"


class _RankFile(logging.FileHandler):
    """File handler that stops after the first error, such as a full disk, instead of reporting every record."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        warn(f"--slm-log-dir: {self.baseFilename} can no longer be written; the run continues without it.")


def open_log(directory: str | None, rank: int) -> logging.Handler | None:
    """Open ``directory/rank_NNNNN.log`` for appending, creating the directory if needed; None if ``directory`` is.

    Raises:
        ConfigError: the file cannot be created.
    """
    if directory is None:
        return None
    path = Path(directory) / f"rank_{rank:05d}.log"
    with explained_write(path, "--slm-log-dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _RankFile(path, encoding="utf-8")
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
