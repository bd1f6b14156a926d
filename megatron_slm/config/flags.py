"""The command line: one flag per setting, merged as default < recipe < flag."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from megatron_slm.config import schema
from megatron_slm.config.recipe import convert, from_flat_dict, nearest, read_recipe, settings
from megatron_slm.config.schema import Config
from megatron_slm.runtime.errors import ConfigError

DESCRIPTION = """Pretrain a language model with Selective Language Modeling on Megatron-Core.
Flags are Megatron-LM's where it has one; those of ours begin with --slm- or --reference-."""


@dataclass(frozen=True)
class Command:
    """What the user asked for: "train", "print-config" or "dry-run", with the resolved configuration."""

    config: Config
    action: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all flags)")


def flag_name(field_name: str, spelling: str | None = None) -> str:
    """The flag of a setting: Megatron-LM's spelling, else the name with hyphens."""
    return spelling or "--" + field_name.replace("_", "-")


def parse(argv: Sequence[str]) -> Command:
    """Read the command line and the recipe that it names.

    Raises:
        ConfigError: an unknown flag or setting, a flag of Megatron-LM's that is not taken, or a bad value.
        SystemExit: after --help.
    """
    parser = _build_parser()
    namespace, unknown = parser.parse_known_args(list(argv))
    typed = vars(namespace)
    if unknown:
        raise _refusal(unknown[0], [name for action in parser._actions for name in action.option_strings])
    recipe_path, action = typed.pop("config", None), typed.pop("action", "train")
    values: dict[str, Any] = {}
    if recipe_path is not None:
        recipe = read_recipe(Path(recipe_path))
        from_flat_dict(recipe, recipe_path)  # names and types are checked with the file's name
        values = {str(key).replace("-", "_"): value for key, value in recipe.items()}
    config = from_flat_dict({**values, **typed}, recipe_path or "command line")
    _check_choices(config)
    return Command(config, action)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megatron_slm.pretrain",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="settings in YAML, by the flags' names; flags win")
    for name, text in (
        ("print-config", "print the resolved settings as a recipe and exit"),
        ("dry-run", "check everything, print the plan and exit"),
    ):
        parser.add_argument(f"--{name}", dest="action", action="store_const", const=name, help=text)
    sections = {
        group.name: parser.add_argument_group(getattr(schema, str(group.type)).__doc__) for group in fields(Config)
    }
    for group, setting, kind in settings():
        flag = flag_name(setting.name, setting.metadata["spelling"])
        options: dict[str, Any] = {
            "dest": setting.name,
            "help": _help(setting.metadata["help"], setting.default, kind),
        }
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (list[str], dict[str, list[str]]):
            options |= {"nargs": "+", "metavar": "WORD", "type": str}
        else:
            options |= {
                "metavar": "|".join(setting.metadata["choices"]) or "VALUE",
                "type": _reader(flag, kind),
            }
        sections[group].add_argument(flag, **options)
    return parser


def _help(text: str, default: Any, kind: Any) -> str:
    shown = default if isinstance(default, str | int | float) and not isinstance(default, bool) else None
    return text.replace("%", "%%") + (f" [{shown}]" if shown is not None else " [on]" if default is True else "")


def _reader(flag: str, kind: Any) -> Any:
    def read(text: str) -> Any:
        return convert(text, kind, flag)

    return read


def _refusal(argument: str, ours: list[str]) -> ConfigError:
    flag = argument.partition("=")[0]
    hint = nearest(flag, ours)
    if not flag.startswith("-"):
        return ConfigError(f"{flag!r} stands alone on the command line: no flag before it takes it.")
    if flag in megatron_flags():
        return ConfigError(f"{flag} is a flag of Megatron-LM's that is not taken here.{hint}")
    return ConfigError(f"unknown flag {flag}.{hint}")


def megatron_flags() -> frozenset[str]:
    """The names of all flags of Megatron-LM's pretrain_gpt.py."""
    text = resources.files("megatron_slm.config").joinpath("megatron_flags.txt").read_text(encoding="utf-8")
    return frozenset(text.split())


def _check_choices(config: Config) -> None:
    for group, setting, _ in settings():
        choices, value = setting.metadata["choices"], getattr(getattr(config, group), setting.name)
        if choices and value is not None and value not in choices:
            flag = flag_name(setting.name, setting.metadata["spelling"])
            raise ConfigError(
                f"{flag} should be one of {', '.join(choices)}, not {value!r}.{nearest(value, list(choices))}"
            )
