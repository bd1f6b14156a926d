"""Constraints of single settings, declared in the metadata of each field: bounds of numbers, and choices.

Constraints between settings are in :mod:`megatron_slm.config.relations`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field
from typing import Any

UNSET: Any = None  # default of required settings: resolve() demands or derives a value
LARGEST_INTEGER = 2**31 - 1  # sizes and counts reach torch, NCCL and Megatron-Core's C++ helpers as 32-bit integers


@dataclass(frozen=True)
class Bounds:
    """Interval of valid numbers; infinities and NaN are never valid."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf

    def contain(self, value: float) -> bool:
        """Return whether ``value`` is finite and within the interval."""
        within = self.above < value < self.below and self.at_least <= value <= self.at_most
        return math.isfinite(value) and within

    def describe(self) -> str:
        """Return a description of the interval: "above 0", "0 or more", "in (0, 1]"."""
        low, high = max(self.above, self.at_least), min(self.below, self.at_most)
        if math.isinf(low) and math.isinf(high):
            return "finite"
        if math.isinf(high):
            return f"above {low:g}" if low == self.above else f"{low:g} or more"
        if math.isinf(low):
            return f"below {high:g}" if high == self.below else f"at most {high:g}"
        return (
            f"in {'(' if low == self.above else '['}{_number(low)}, {_number(high)}{')' if high == self.below else ']'}"
        )


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    unsupported: Mapping[str, str] | None = None,
    required: bool = False,
    spelling: str | None = None,
    core: str = "",
    example: str | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Return a dataclass field for a flag, with its constraints.

    Args:
        default: default value, or factory.
        help: help text of the flag.
        choices: valid values of a string.
        unsupported: reason and remedy by value, for values of Megatron-LM that are not among the choices.
        required: whether a run needs the setting and no other setting implies it.
        spelling: Megatron-LM's spelling, if it differs from the field's name with hyphens.
        core: Megatron-Core fields that receive the value, see :mod:`megatron_slm.config.core_fields`.
        example: recommended value, for the error message.
        above: exclusive lower bound.
        at_least: inclusive lower bound.
        below: exclusive upper bound.
        at_most: inclusive upper bound; LARGEST_INTEGER by default for integers.
    """
    given = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    bounds = Bounds(**{name: value for name, value in given.items() if value is not None})
    metadata = {
        "help": help,
        "choices": choices,
        "unsupported": unsupported or {},
        "required": required,
        "spelling": spelling,
        "core": core,
        "example": example,
        "bounds": bounds,
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_name(setting: Field[Any]) -> str:
    """Return the flag of a setting: Megatron-LM's spelling, or the field's name with hyphens."""
    return setting.metadata["spelling"] or "--" + setting.name.replace("_", "-")


def violations(setting: Field[Any], value: Any) -> Iterator[str]:
    """Yield a message for each constraint of ``setting`` that ``value`` violates."""
    name = flag_name(setting)
    if value is None or isinstance(value, bool):
        return
    numbers = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int | float)]
    if numbers:
        for number in numbers:
            yield from _number_violations(setting, number)
    elif setting.metadata["choices"]:
        for item in value if isinstance(value, list) else [value]:
            if item in setting.metadata["unsupported"]:
                yield f"{name} {item} is not supported: {setting.metadata['unsupported'][item]}"
            elif item not in setting.metadata["choices"]:
                yield f"{name} must be one of {', '.join(setting.metadata['choices'])}, not {item!r}."


def _number_violations(setting: Field[Any], value: float) -> Iterator[str]:
    bounds: Bounds = setting.metadata["bounds"]
    example = setting.metadata["example"]
    hint = f", for example {example}" if example else ""
    if not _is_contained(bounds, value):
        yield f"{flag_name(setting)} is {_shown(value)}, and must be {bounds.describe()}{hint}."
    elif isinstance(value, int) and math.isinf(bounds.at_most) and value > LARGEST_INTEGER:
        yield f"{flag_name(setting)} is {_shown(value)}, and must be at most {LARGEST_INTEGER}."


def _is_contained(bounds: Bounds, value: float) -> bool:
    try:
        return bounds.contain(value)
    except OverflowError:  # an integer beyond the largest float
        return value > 0 and math.isinf(bounds.at_most) and math.isinf(bounds.below)


def _shown(value: float) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"
