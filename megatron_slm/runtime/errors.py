"""The two ways in which a run ends for a reason that its user can act on."""

from __future__ import annotations

import errno
from collections.abc import Sequence

FILE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of a read or write, which know no path
LONGEST_NAME = 200  # characters of a path in a message


class ConfigError(Exception):
    """The user's mistake (flag, recipe, file, layout). The message names it and the remedy; exit code 2."""

    exit_code = 2


class DivergedError(Exception):
    """A loss became NaN or infinite. The message names the rank and the position; exit code 3."""

    exit_code = 3


def refuse(problems: Sequence[str]) -> None:
    """Raise one ConfigError for all problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))


def unreadable(what: str, path: object, reason: OSError | str) -> ConfigError:
    """Return the error for a file that cannot be read; ``what`` is the flag or the role of the file."""
    shown = reason if isinstance(reason, str) else reason.strerror or reason
    return ConfigError(f"{what}: {path} cannot be read ({shown}). Check its permissions and the disk.")


def explain(error: Exception) -> ConfigError | None:
    """Return a message for an error of the machine, which needs no traceback: a file or a lack of memory; else None."""
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
