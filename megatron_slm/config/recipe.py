"""Read and write configurations as flat YAML: recipes, saved configurations and --print-config."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_slm.config import schema
from megatron_slm.config.blends import UniqueLoader, blend_arguments
from megatron_slm.config.constraints import UNSET
from megatron_slm.config.megatron_lm.refused import megatron_flags, remedy
from megatron_slm.config.paths import PATH_LISTS, PATH_SETTINGS, expand_paths
from megatron_slm.config.renamed import current_spelling
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError, refuse

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@cache
def settings() -> tuple[tuple[str, Field[Any], Any], ...]:
    """Return (group name, field, type) of every setting, in the order of the help."""
    return tuple(_iterate_settings())


def _iterate_settings() -> Iterator[tuple[str, Field[Any], Any]]:
    for group in fields(RunConfig):
        group_type = getattr(schema, str(group.type))
        hints = get_type_hints(group_type)
        for setting in fields(group_type):
            kind = hints[setting.name]
            yield group.name, setting, kind | None if setting.default is UNSET else kind


def tokenizer_settings() -> list[tuple[Field[Any], Any]]:
    """Return (field, type) of the settings that define a tokenizer."""
    return [
        (setting, kind) for group, setting, kind in settings() if group == "tokenizer" or setting.name == "vocab_size"
    ]


def to_flat_dict(config: RunConfig) -> dict[str, Any]:
    """Return all settings by name."""
    return {setting.name: getattr(getattr(config, group), setting.name) for group, setting, _ in settings()}


def from_flat_dict(values: Mapping[str, Any], location: str = "configuration") -> RunConfig:
    """Return a configuration from settings by name; the others keep their defaults.

    Raises:
        ConfigError: an unknown name, or a value of the wrong type; the message names ``location``.
    """
    converted, problems = convert_settings(values, lambda name: f"{location}: {name}")
    refuse(problems)
    return with_settings(RunConfig(), converted)


def with_settings(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with the settings in ``values`` replaced."""
    changes: dict[str, dict[str, Any]] = {}
    for group, setting, _ in settings():
        if setting.name in values:
            changes.setdefault(group, {})[setting.name] = values[setting.name]
    return replace(config, **{group: replace(getattr(config, group), **named) for group, named in changes.items()})


def convert_settings(values: Mapping[str, Any], label: Callable[[str], str]) -> tuple[dict[str, Any], list[str]]:
    """Convert settings to the types of their fields; return them and a message per unknown name or invalid value.

    Args:
        label: returns the location of a setting, for the messages.
    """
    converted: dict[str, Any] = {}
    known = {setting.name: kind for _, setting, kind in settings()}
    problems: list[str] = []
    for key, given in values.items():
        spelled, value = current_spelling(str(key).replace("-", "_"), given)
        name = _positive(spelled)
        if name not in known:
            problems.append(refusal_message(label(key), f"--{name.replace('_', '-')}", name, list(known)))
            continue
        try:
            paths = [value] if name in PATH_LISTS and isinstance(value, str) else value
            found = convert(paths, known[name], label(key))
            found = expand_paths(found) if name in PATH_SETTINGS else found
            converted[name] = found if spelled == name else not found
        except ConfigError as error:
            problems.append(str(error))
    return converted, problems


def refusal_message(label: str, flag: str, name: str, names: list[str]) -> str:
    """Return the message for an unknown flag or setting, or an unsupported flag of Megatron-LM.

    Args:
        label: location, for the message.
        flag: the flag.
        name: the flag or setting as given.
        names: known flags or settings, to suggest a similar one from.
    """
    if flag in megatron_flags():
        return f"{label} is a Megatron-LM flag that is not supported: {remedy(flag)}"
    return f"{label} is unknown.{suggest_name(name, names)}"


def suggest_name(name: str, names: list[str]) -> str:
    """Return " Did you mean NAME?", or an empty string if no name is similar."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


def convert(value: Any, kind: Any, location: str) -> Any:
    """Convert ``value``, from YAML or a command line, to the type ``kind``.

    Raises:
        ConfigError: the value is not of that type; the message names ``location``.
    """
    if get_origin(kind) in (types.UnionType, Union):
        if value is None:
            return None
        kind = next(option for option in get_args(kind) if option is not type(None))
    refuse_empty(value, location)
    if kind == list[str]:
        return blend_arguments(value, location)
    if kind == list[int]:
        return [convert(item, int, location) for item in (value if isinstance(value, list) else [value])]
    if kind == dict[str, list[str]]:
        return _named_sets(value, location)
    if value is None or isinstance(value, list | dict):
        raise ConfigError(f"{location} must be {_describe(kind)}, not {value!r}.")
    if kind is bool:
        return _bool(value, location)
    try:
        if isinstance(value, bool) and kind is not str:
            raise ValueError
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        return kind(str(value))
    except ValueError:
        raise ConfigError(f"{location} must be {_describe(kind)}, not {value!r}.") from None


def refuse_empty(value: Any, location: str) -> None:
    """Raise ConfigError for text that is empty (often an unset shell variable) or not valid UTF-8."""
    if isinstance(value, list):
        for item in value:
            refuse_empty(item, location)
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_empty("" if item is None or item == [] else item, f"{location}.{name}")
    if not isinstance(value, str):
        return
    if not value.strip():
        raise ConfigError(f"{location} is empty. Give a value, or leave it out.")
    check_text(value, location)


def check_text(value: str, location: str) -> None:
    """Raise ConfigError for text that is not valid UTF-8."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"{location}: {value!r} is not valid UTF-8 text. Rename the file, or correct the value.")


def _describe(kind: Any) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(kind, str(kind))


def _bool(value: Any, location: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text not in TRUE + FALSE:
        raise ConfigError(f"{location} must be true or false, not {value!r}.")
    return text in TRUE


def _named_sets(value: Any, location: str) -> dict[str, list[str]]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return {str(name): blend_arguments(blend, f"{location}.{name}") for name, blend in value.items()}
    sets: dict[str, list[str]] = {}
    name = "valid"
    for argument in blend_arguments(value, location):
        head, equals, rest = argument.partition("=")
        if equals and "/" not in head:
            name, argument = head, rest
            if name in sets:
                raise ConfigError(f"{location}: the set {name!r} is given twice.")
            if not name.strip() or not argument.strip():
                raise ConfigError(
                    f"{location}: {head}={rest} lacks a {'prefix' if name.strip() else 'name'}. Write NAME=PREFIX."
                )
        sets.setdefault(name, []).append(argument)
    return sets


class RecipeLoader(UniqueLoader):
    """YAML loader that reads a missing value as empty text, which is refused, and ``null`` as the default."""


def _construct_null(loader: RecipeLoader, node: yaml.ScalarNode) -> str | None:
    return None if node.value else ""


RecipeLoader.add_constructor("tag:yaml.org,2002:null", _construct_null)


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file by name, with underscores.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, or has a setting twice or without a value.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: the recipe cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the recipe is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the recipe is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe must be a mapping of flag names to values, one 'name: value' per line.")
    names = [str(key).replace("-", "_") for key in values]
    subjects = [_positive(name) for name in names]
    refuse([f"{path}: {name} is given twice." for name in sorted(set(subjects)) if subjects.count(name) > 1])
    return dict(zip(names, values.values(), strict=True))


def read_assignment(text: str) -> tuple[str, Any]:
    """Return the setting and the value of NAME=VALUE, whose value is YAML and whose name may be written as a flag.

    Raises:
        ConfigError: the text has no name or no value, or the value is not valid YAML.
    """
    check_text(text, "--set")
    name, _, value = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if not name or not value.strip():
        raise ConfigError(f"--set {text}: a setting is written as NAME=VALUE, for example lr=1e-4.")
    try:
        return name, yaml.load(value, RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--set {name}: {value!r} is not valid YAML: {reason}. Quote text as '...'.") from error


def _positive(name: str) -> str:
    """Return the setting that Megatron-LM's spelling ``no_NAME`` disables; return other names unchanged."""
    known = {setting.name: kind for _, setting, kind in settings()}
    positive = name.removeprefix("no_")
    return positive if name not in known and known.get(positive) is bool else name


def read_config(path: Path) -> RunConfig:
    """Return a saved configuration."""
    return from_flat_dict(read_recipe(path), str(path))


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML, which is a valid recipe."""
    return yaml.safe_dump(to_flat_dict(config), sort_keys=False)
