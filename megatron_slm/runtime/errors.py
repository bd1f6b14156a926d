"""The two ways in which a run ends for a reason that its user can act on."""

from __future__ import annotations

from collections.abc import Sequence


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
