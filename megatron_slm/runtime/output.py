"""Standard output and error for terminals of any encoding."""

from __future__ import annotations

import codecs
import sys

ASCII = {"τ": "tau", "θ": "theta", "−": "-", "–": "-", "—": "-", "±": "+-", "×": "x", "…": "...", "·": "*", "≥": ">="}


def prepare_output() -> None:
    """Let standard output and error take any character, whatever the terminal's encoding is."""
    codecs.register_error("spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Error handler of an encoding: Greek letters and signs by name, other characters as "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in text), error.end
