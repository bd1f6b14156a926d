"""Quoting of values in bash commands and in ``#SBATCH`` lines."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from megatron_slm.config.recipe import check_text
from megatron_slm.runtime.errors import ConfigError

INDENT = "    "


def check_line(value: str, location: str) -> str:
    """Return ``value``.

    Raises:
        ConfigError: it is empty, has a control character such as a line break, or is not valid UTF-8.
    """
    check_text(value, location)
    if not value.strip() or not value.isprintable():
        raise ConfigError(f"{location}: {value!r} must be one line of printable characters. Correct the value.")
    return value


def sbatch_line(option: str, value: object = None) -> str:
    """Return an ``#SBATCH`` line; sbatch itself parses it, with quotes and backslashes but without expansions."""
    if value is None:
        return f"#SBATCH --{option}"
    text = str(value)
    if shlex.quote(text) != text:
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{option}={text}"


def bash_array(name: str, lines: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a bash array of literal arguments, in the given lines."""
    content = [INDENT + shlex.join(line) for line in lines]
    return [f"{name}=(", *content, ")"] if content else [f"{name}=()"]


def argument_lines(arguments: Iterable[str]) -> list[list[str]]:
    """Return arguments in lines that start at a flag."""
    lines: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(argument)
    return lines
