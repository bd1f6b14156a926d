"""Renamed flags and values of versions 0.1 and 0.2, which are accepted for one more release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SETTINGS = {"slm_kept_logits_mb": "slm_saved_logits_mb"}
VALUES = {("slm_threshold", "carried"): "predicted", ("slm_mtp_selection", "own"): "independent"}


def current_spelling(name: str, value: Any) -> tuple[str, Any]:
    """Return the current spelling of a setting and its value."""
    name = SETTINGS.get(name, name)
    return name, VALUES.get((name, value), value) if isinstance(value, str) else value


def renaming_notes(values: Mapping[str, Any]) -> list[str]:
    """Return a note for each old spelling among the settings of a recipe or command line."""
    notes = []
    for name, value in values.items():
        new_name, new_value = current_spelling(name, value)
        old, new = _flag(name), _flag(new_name)
        if new_value is not value:
            old, new = f"{old} {value}", f"{new} {new_value}"
        if old != new:
            notes.append(f"{old} is now {new}; the next release will refuse the old spelling")
    return notes


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
