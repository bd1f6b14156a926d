"""Interpret the accepted flags of Megatron-LM: apply implied settings and verify stated facts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_slm.config.megatron_lm.accepted import FACTS, IMPLIED, INTEGER, SWITCH, WITHOUT_EFFECT
from megatron_slm.config.megatron_lm.refused import megatron_flags
from megatron_slm.config.recipe import convert
from megatron_slm.config.recipe import settings as all_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError

ACCEPTED = (*IMPLIED, *FACTS, *WITHOUT_EFFECT)
Label = Callable[[str], str]


def add_accepted_flags(parser: argparse.ArgumentParser) -> None:
    """Add the accepted flags to a parser, without help texts; the destination of each is the flag itself."""
    for flag in ACCEPTED:
        options: dict[str, Any] = {} if _values(flag) else {"action": "store_const", "const": True}
        parser.add_argument(flag, dest=flag, help=argparse.SUPPRESS, **options)


def split(values: Mapping[str, Any], label: Label) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Split the values of one source (command line or recipe) into settings and accepted flags.

    Implied settings are added to the settings.

    Args:
        values: values by setting or flag, with underscores or hyphens.
        label: returns the location of a name, for the messages.

    Returns:
        Settings, values of accepted flags, and a message for each flag with an invalid value.
    """
    settings: dict[str, Any] = {}
    stated: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        flag = name if name.startswith("--") else "--" + name.replace("_", "-")
        if flag not in ACCEPTED:
            if not _is_left_out(flag, value):
                settings[name] = value
            continue
        try:
            if (converted := _convert(flag, value, label(name))) is not False:
                stated[flag] = converted
        except ConfigError as error:
            problems.append(str(error))
    for flag, (name, implied) in IMPLIED.items():
        if flag not in stated:
            continue
        if str(settings.setdefault(name, implied)).lower() != str(implied).lower():
            problems.append(f"{flag} contradicts {label(name)} {settings[name]}. Leave one of them out.")
    return settings, stated, problems


def _is_left_out(flag: str, value: Any) -> bool:
    """Return whether a recipe disables an unsupported flag of Megatron-LM (false or null), which is ignored."""
    if not (value is False or value is None) or flag not in megatron_flags():
        return False
    name = flag.removeprefix("--").replace("-", "_")
    names = {setting.name for _, setting, _ in all_settings()}
    return name not in names and name.removeprefix("no_") not in names


def _values(flag: str) -> tuple[str, ...]:
    return FACTS[flag].values if flag in FACTS else WITHOUT_EFFECT.get(flag, SWITCH)


def _convert(flag: str, value: Any, label: str) -> Any:
    """Return the value of a flag; False for a switch that a recipe disables."""
    values = _values(flag)
    if not values:
        return convert(value, bool, label)
    if values == INTEGER:
        return convert(value, int, label)
    text = convert(value, str, label)
    if text not in values:
        reason = f": {FACTS[flag].remedy}" if flag in FACTS else f" and must be one of {', '.join(values)}."
        raise ConfigError(f"{label} is {text!r}{reason}")
    return text


def contradictions(config: RunConfig, stated: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each stated flag that contradicts the configuration."""
    for flag in stated:
        if flag in FACTS and not FACTS[flag].holds(config):
            yield f"{flag}: {FACTS[flag].remedy}"
    if "--grad-reduce-in-bf16" in stated and config.training.fp16:
        yield (
            "--grad-reduce-in-bf16 would reduce gradients in fp16 with --fp16. Leave it out, or give "
            "--no-accumulate-allreduce-grads-in-fp32 to reduce them in fp16, as Megatron-LM does."
        )
    if stated.get("--attention-backend") == "local" and config.model.transformer_impl == "transformer_engine":
        yield f"--attention-backend local: {FACTS['--attention-backend'].remedy}"


def describe(stated: Mapping[str, Any]) -> str:
    """Return a log line on the accepted flags that change no setting, empty if there are none."""
    facts = [_shown(flag, stated) for flag in stated if flag in FACTS]
    idle = [_shown(flag, stated) for flag in stated if flag in WITHOUT_EFFECT]
    parts = []
    if facts:
        parts.append(f"satisfied by every run: {', '.join(facts)}")
    if idle:
        parts.append(f"without effect: {', '.join(idle)}")
    return f"Megatron-LM's flags {'; '.join(parts)}" if parts else ""


def _shown(flag: str, stated: Mapping[str, Any]) -> str:
    return flag if stated[flag] is True else f"{flag} {stated[flag]}"
