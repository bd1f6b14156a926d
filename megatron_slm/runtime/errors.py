"""The two ways in which a run ends for a reason that its user can act on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

SECONDS_FOR_RANK_0 = 2.0  # to report an error before the other ranks do


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


def report_error(error: Exception) -> None:
    """Say what is wrong once: as a rule all ranks fail alike, and the launcher ends the others when one has."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(SECONDS_FOR_RANK_0)
    print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
