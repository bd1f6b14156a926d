"""Errors that end a run with a message for the user instead of a traceback."""

from __future__ import annotations

import errno
from collections.abc import Sequence

FILE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of reads and writes, which carry no path
LONGEST_NAME = 200  # characters of a path in a message
# Messages of collectives whose peer has exited, and of others that may have failed for this reason.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
OF_COMMUNICATION = (*LOST_PEER, "NCCL", "Timed out waiting", "Socket Timeout")


class ConfigError(Exception):
    """Error in the user's input (flag, recipe, file, layout), with location and remedy in the message; exit code 2."""

    exit_code = 2


class UnusableFileError(ConfigError):
    """Damaged, missing or unreadable file, of which another copy or an earlier state may be intact."""


class DivergedError(Exception):
    """NaN or infinite loss, with rank and position in the message; exit code 3."""

    exit_code = 3


def refuse(problems: Sequence[str]) -> None:
    """Raise one ConfigError with all problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))


def read_error(role: str, path: object, reason: OSError | str) -> UnusableFileError:
    """Return the error for an unreadable file; ``role`` is the flag or the role of the file."""
    shown = reason if isinstance(reason, str) else reason.strerror or reason
    return UnusableFileError(f"{role}: {path} cannot be read ({shown}). Check its permissions and the disk.")


def explain(error: Exception) -> ConfigError | None:
    """Return a ConfigError for a file error or a lack of memory, which need no traceback; None for other errors."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FILE_ERRORS):
        name = "a file" if error.filename is None else str(error.filename)
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
        return ConfigError(
            f"{shown}: {error.strerror}. Check the path, its permissions, and the free space of the disk."
        )
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "can't allocate memory" in str(error):  # torch's message on a CPU
        return ConfigError(
            f"out of memory: {str(error).strip() or 'the machine has no more'}. Choose a smaller --micro-batch-size or "
            "model, --recompute-granularity full, or more tensor or pipeline parallelism."
        )
    return None
