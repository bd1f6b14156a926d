"""The two ways in which a run ends for a reason that its user can act on."""

from __future__ import annotations


class ConfigError(Exception):
    """The user's mistake (flag, recipe, file, layout). The message names it and the remedy; exit code 2."""

    exit_code = 2


class DivergedError(Exception):
    """A loss became NaN or infinite. The message names the rank and the position; exit code 3."""

    exit_code = 3
