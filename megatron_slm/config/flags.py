"""Command-line parsing: one flag per setting, with the precedence default < recipe < --set < flag."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_slm.config import schema
from megatron_slm.config.checkpoint_args import Adopt
from megatron_slm.config.checks import value_violations
from megatron_slm.config.constraints import LARGEST_INTEGER, flag_name
from megatron_slm.config.layers import read_layers
from megatron_slm.config.megatron_lm.statements import Label, add_accepted_flags, contradictions, describe, split
from megatron_slm.config.paths import expand_user
from megatron_slm.config.recipe import (
    check_text,
    convert,
    convert_settings,
    read_assignment,
    refusal_message,
    refuse_empty,
    settings,
    suggest_name,
    with_settings,
)
from megatron_slm.config.renamed import SETTINGS as RENAMED_SETTINGS
from megatron_slm.config.renamed import renaming_notes
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError, refuse

DESCRIPTION = """Pretrain a language model with Selective Language Modeling on Megatron-Core.
Flags have Megatron-LM's names and meanings; additional flags start with --slm-, --reference- or --replay-."""


@dataclass(frozen=True)
class Command:
    """Unresolved settings of the command line and its recipes, and an action: train, print-config or dry-run."""

    config: RunConfig
    action: str
    note: str = ""  # on flags without effect and settings adopted from a checkpoint
    world_size: int | None = None  # number of ranks that a dry run plans for; default the started processes


class Parser(argparse.ArgumentParser):
    """Argument parser that raises ConfigError instead of printing its usage.

    Arguments such as -1e-3, -inf and -1,2,3 are values, which argparse would take for flags. Flags cannot be
    abbreviated, and the description keeps its lines.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        hint = "a switch takes no value" if "ignored explicit argument" in message else "--help lists all flags"
        raise ConfigError(f"{message} ({hint})")


def parse_strictly(
    parser: Parser, argv: Sequence[str], refused: Mapping[str, str], *, may_be_empty: Collection[str] = ()
) -> argparse.Namespace:
    """Parse the arguments of a command-line tool.

    Args:
        refused: remedy by flag, for unsupported flags of Megatron-LM's tool or of earlier releases.
        may_be_empty: names of arguments that are lists of any text.

    Raises:
        ConfigError: an unknown or unsupported flag, or an empty or invalid value.
    """
    arguments, unknown = parser.parse_known_args(list(argv))
    if not unknown:
        for action in parser._actions:
            value = getattr(arguments, action.dest, None)
            name = action.option_strings[-1] if action.option_strings else action.dest
            if action.dest in may_be_empty:
                for text in value or ():
                    check_text(text, name)
            elif value != action.default:
                refuse_empty(value, name)
        return arguments
    flag = unknown[0].partition("=")[0]
    if flag in refused:
        raise ConfigError(f"{flag} is not supported. {refused[flag]}")
    if not flag.startswith("-"):
        raise ConfigError(f"unexpected positional argument {flag!r}.")
    raise ConfigError(f"unknown flag {flag}.{suggest_name(flag, list(parser._option_string_actions))}")


def parse(argv: Sequence[str], adopt: Adopt | None = None, *, other_flags: Sequence[str] = ()) -> Command:
    """Parse the command line and its recipes.

    Args:
        adopt: function that takes settings from the checkpoint which the run starts from.
        other_flags: flags that the caller has removed from ``argv``, to suggest instead of misspelled ones.

    Raises:
        ConfigError: one message with all unknown or unsupported flags and settings and all invalid values.
        SystemExit: after --help.
    """
    parser = _build_parser()
    namespace, unknown = parser.parse_known_args(list(argv))
    typed = vars(namespace)
    recipes, action = typed.pop("config", []), typed.pop("action", "train")
    world_size = _planned_ranks(typed.pop("world_size", None), action)
    names = {setting.name: flag_name(setting) for _, setting, _ in settings()}
    sources = [*_recipe_sources(recipes), *map(_assignment_source, typed.pop("set", []))]
    sources.append((typed, lambda name: names.get(name, name)))
    problems = _refusals(unknown, [*parser._option_string_actions, *other_flags])
    given, stated, notes = dict[str, Any](), dict[str, Any](), list[str]()
    for values, label in sources:
        notes += renaming_notes(values)
        plain, flags, wrong = split(values, label)
        converted, unusable = convert_settings(plain, label)
        given, stated, problems = given | converted, stated | flags, [*problems, *wrong, *unusable]
    config = with_settings(RunConfig(), given)
    notes.append(describe(stated))
    if adopt is not None and not problems:
        config, note = adopt(config, frozenset(given))
        notes.append(note)
    refuse([*problems, *value_violations(config), *contradictions(config, stated)])
    return Command(config, action, "\n".join(filter(None, notes)), world_size)


def _planned_ranks(text: str | None, action: str) -> int | None:
    """Return the value of --world-size."""
    if text is None:
        return None
    if action != "dry-run":
        raise ConfigError("--world-size is for --dry-run. Start the ranks of a run with torchrun or srun.")
    count: int = convert(text, int, "--world-size")
    refuse([] if 0 < count <= LARGEST_INTEGER else [f"--world-size is {text}, and must be above 0."])
    return count


def _recipe_sources(recipes: Sequence[str]) -> list[tuple[dict[str, Any], Label]]:
    """Return the settings of the recipes and their bases in order of application."""
    layers = read_layers([Path(expand_user(convert(recipe, str, "--config"))) for recipe in recipes])
    return [(values, partial("{}: {}".format, path)) for path, values in layers]


def _assignment_source(text: str) -> tuple[dict[str, Any], Label]:
    """Return the setting of a --set NAME=VALUE."""
    name, value = read_assignment(text)
    return {name: value}, lambda _: f"--set {name}"


@cache
def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="megatron_slm.pretrain", description=DESCRIPTION, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        metavar="RECIPE.yaml",
        help="YAML files with settings by flag name; later recipes override earlier ones, and flags override recipes",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="settings by flag name, with values in YAML; they override recipes, and flags override them",
    )
    for name, text in (
        ("print-config", "print the settings of the command line and its recipes as a recipe and exit"),
        ("dry-run", "validate the configuration and files, print the plan and exit"),
    ):
        parser.add_argument(f"--{name}", dest="action", action="store_const", const=name, help=text)
    parser.add_argument(
        "--world-size",
        metavar="N",
        help="number of ranks to plan for with --dry-run, also of another machine; default the started processes",
    )
    sections = {
        group.name: parser.add_argument_group(getattr(schema, str(group.type)).__doc__) for group in fields(RunConfig)
    }
    for group, setting, kind in settings():
        options: dict[str, Any] = {"dest": setting.name, "help": _help(setting.metadata["help"], setting.default)}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (list[str], list[int], dict[str, list[str]]):
            options |= {"nargs": "+", "metavar": "|".join(setting.metadata["choices"]) or "ARGUMENT"}
        else:
            options["metavar"] = "|".join(setting.metadata["choices"]) or "VALUE"
        sections[group].add_argument(flag_name(setting), **options)
    for old in RENAMED_SETTINGS:
        parser.add_argument(f"--{old.replace('_', '-')}", dest=old, help=argparse.SUPPRESS)
    add_accepted_flags(parser)
    return parser


def _help(text: str, default: Any) -> str:
    shown = default if isinstance(default, str | int | float) and not isinstance(default, bool) else None
    return text.replace("%", "%%") + (f" [{shown}]" if shown is not None else " [on]" if default is True else "")


def _refusals(unknown: Sequence[str], known: list[str]) -> list[str]:
    """Return a message for each unexpected argument."""
    flags = dict.fromkeys(argument.partition("=")[0] for argument in unknown if re.match(r"-+[a-zA-Z]", argument))
    if unknown and not flags:
        return [f"unexpected positional argument {unknown[0]!r}."]
    return [refusal_message(flag, flag, flag, known) for flag in flags]
