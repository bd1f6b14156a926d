"""Reads and writes configurations as flat YAML: recipes, the configuration saved in a checkpoint, --print-config."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_slm.config import schema
from megatron_slm.config.blends import UniqueLoader, blend_words
from megatron_slm.config.constraints import UNSET
from megatron_slm.config.megatron_lm.refused import megatron_flags, remedy
from megatron_slm.config.paths import PATH_SETTINGS, expanded_paths
from megatron_slm.config.renamed import current
from megatron_slm.config.schema import Config
from megatron_slm.runtime.errors import ConfigError, refuse

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def settings() -> Iterator[tuple[str, Field[Any], Any]]:
    """(name of the group, field, type) of every setting, in the order of the help."""
    for group in fields(Config):
        group_type = getattr(schema, str(group.type))
        hints = get_type_hints(group_type)
        for setting in fields(group_type):
            kind = hints[setting.name]
            yield group.name, setting, kind | None if setting.default is UNSET else kind


def to_flat_dict(config: Config) -> dict[str, Any]:
    """Every setting by name."""
    return {setting.name: getattr(getattr(config, group), setting.name) for group, setting, _ in settings()}


def from_flat_dict(values: Mapping[str, Any], where: str = "configuration") -> Config:
    """A configuration from settings by name; those that are not named keep their defaults.

    Raises:
        ConfigError: an unknown name, or a value of the wrong type; ``where`` is named in the message.
    """
    converted, problems = convert_settings(values, lambda name: f"{where}: {name}")
    refuse(problems)
    return with_settings(Config(), converted)


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the configuration with the settings of ``values``, by name, replaced."""
    changes: dict[str, dict[str, Any]] = {}
    for group, setting, _ in settings():
        if setting.name in values:
            changes.setdefault(group, {})[setting.name] = values[setting.name]
    return replace(config, **{group: replace(getattr(config, group), **named) for group, named in changes.items()})


def convert_settings(values: Mapping[str, Any], label: Callable[[str], str]) -> tuple[dict[str, Any], list[str]]:
    """Return settings in the types of their fields, and a message for each unknown name and unusable value.

    Args:
        label: returns the place of a setting, for the messages.
    """
    converted: dict[str, Any] = {}
    known = {setting.name: kind for _, setting, kind in settings()}
    problems: list[str] = []
    for key, given in values.items():
        spelled, value = current(str(key).replace("-", "_"), given)
        name = _positive(spelled)
        if name not in known:
            problems.append(refusal(label(key), f"--{name.replace('_', '-')}", name, list(known)))
            continue
        try:
            found = convert(value, known[name], label(key))
            found = expanded_paths(found) if name in PATH_SETTINGS else found
            converted[name] = found if spelled == name else not found
        except ConfigError as error:
            problems.append(str(error))
    return converted, problems


def refusal(label: str, flag: str, name: str, names: list[str]) -> str:
    """Return the message for a flag or a setting that is unknown, or Megatron-LM's and not taken.

    Args:
        label: the place, for the message.
        flag: the flag.
        name: the flag or the setting as given, to look for among ``names``.
    """
    if flag in megatron_flags():
        return f"{label} is a flag of Megatron-LM's that is not taken here: {remedy(flag)}"
    return f"{label} is unknown.{nearest(name, names)}"


def nearest(name: str, names: list[str]) -> str:
    """ " Did you mean ...?", or nothing where nothing is near."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


def convert(value: Any, kind: Any, where: str) -> Any:
    """``value``, from YAML or a command line, as ``kind``.

    Raises:
        ConfigError: it cannot be read as such; ``where`` is named in the message.
    """
    if get_origin(kind) in (types.UnionType, Union):
        if value is None:
            return None
        kind = next(option for option in get_args(kind) if option is not type(None))
    refuse_empty(value, where)
    if kind == list[str]:
        return blend_words(value, where)
    if kind == dict[str, list[str]]:
        return _named_sets(value, where)
    if value is None or isinstance(value, list | dict):
        raise ConfigError(f"{where} should be {_describe(kind)}, not {value!r}.")
    if kind is bool:
        return _bool(value, where)
    try:
        if isinstance(value, bool) and kind is not str:
            raise ValueError
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        return kind(str(value))
    except ValueError:
        raise ConfigError(f"{where} should be {_describe(kind)}, not {value!r}.") from None


def refuse_empty(value: Any, where: str) -> None:
    """Refuse text that is empty (an unset shell variable, as a rule) or cannot be written as UTF-8."""
    if isinstance(value, list):
        for item in value:
            refuse_empty(item, where)
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_empty("" if item is None or item == [] else item, f"{where}.{name}")
    if not isinstance(value, str):
        return
    if not value.strip():
        raise ConfigError(f"{where} is empty. Give a value, or leave it out.")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"{where}: {value!r} is not valid UTF-8 text. Rename the file, or correct the value.")


def _describe(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(kind, str(kind))


def _bool(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word not in TRUE + FALSE:
        raise ConfigError(f"{where} should be true or false, not {value!r}.")
    return word in TRUE


def _named_sets(value: Any, where: str) -> dict[str, list[str]]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return {str(name): blend_words(words, f"{where}.{name}") for name, words in value.items()}
    sets: dict[str, list[str]] = {}
    name = "valid"
    for word in blend_words(value, where):
        head, equals, rest = word.partition("=")
        if equals and "/" not in head:
            name, word = head, rest
            if name in sets:
                raise ConfigError(f"{where}: the set {name!r} is named twice.")
            if not name.strip() or not word.strip():
                raise ConfigError(
                    f"{where}: {head}={rest} lacks a {'prefix' if name.strip() else 'name'}. Write NAME=PREFIX."
                )
        sets.setdefault(name, []).append(word)
    return sets


class RecipeLoader(UniqueLoader):
    """YAML in which a name without a value is empty text, which is refused; ``null`` is the default."""


def _construct_null(loader: RecipeLoader, node: yaml.ScalarNode) -> str | None:
    return None if node.value else ""


RecipeLoader.add_constructor("tag:yaml.org,2002:null", _construct_null)


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, with the flags' names in underscores.

    Raises:
        ConfigError: the file is missing, is no YAML, is not a mapping, or names a setting twice or without a value.
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
        raise ConfigError(f"{path}: a recipe is a list of 'name: value' lines with the flags' names.")
    names = [str(key).replace("-", "_") for key in values]
    subjects = [_positive(name) for name in names]
    refuse([f"{path}: {name} is given twice." for name in sorted(set(subjects)) if subjects.count(name) > 1])
    return dict(zip(names, values.values(), strict=True))


def _positive(name: str) -> str:
    """Return the setting that Megatron-LM's spelling ``no_NAME`` turns off, and any other name as it is."""
    known = {setting.name: kind for _, setting, kind in settings()}
    positive = name.removeprefix("no_")
    return positive if name not in known and known.get(positive) is bool else name


def read_config(path: Path) -> Config:
    """A saved configuration."""
    return from_flat_dict(read_recipe(path), str(path))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, itself a valid recipe."""
    return yaml.safe_dump(to_flat_dict(config), sort_keys=False)
