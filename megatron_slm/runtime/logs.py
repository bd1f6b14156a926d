"""Log files: one per rank, a line per event with time and rank.

The console shows what happens once; a rank that is slow, hangs or fails is found in its file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_slm.runtime.console import warn
from megatron_slm.runtime.files import explained_write

LOGGER = logging.getLogger("megatron_slm")
LIBRARIES = ("megatron", "torch", "py.warnings")  # recorded from their level WARNING on
FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"


class _RankFile(logging.FileHandler):
    """A file handler that stops after an error, such as a full disk, instead of reporting every record."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        warn(f"--slm-log-dir: {self.baseFilename} can no longer be written; the run continues without it.")


def open_log(directory: str | None, rank: int) -> logging.Handler | None:
    """Open ``directory/rank_NNNNN.log`` to append to it; the directory is created if needed. None records nothing.

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
def logging_to(handler: logging.Handler | None) -> Iterator[None]:
    """Write the log records of the block, and the error that ends it, if any, to ``handler``, and close it."""
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
