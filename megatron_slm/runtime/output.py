"""Encoding-safe standard output and error."""

from __future__ import annotations

import codecs
import sys

ASCII = {"τ": "tau", "θ": "theta", "−": "-", "–": "-", "—": "-", "±": "+-", "×": "x", "…": "...", "·": "*", "≥": ">="}


def prepare_output() -> None:
    """Make standard output and error accept any character, independent of the terminal's encoding."""
    codecs.register_error("spelled", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Handle encoding errors: spell Greek letters and signs in ASCII, replace other characters by "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in text), error.end
