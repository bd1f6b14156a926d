"""Resolve blends of corpora from the command line, recipes and blend files.

The resolved configuration always holds the blend as a list of arguments (prefixes, or weights and prefixes), so that a
checkpoint records the corpora of its run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.config.paths import expand_paths
from megatron_slm.config.schema import DataConfig
from megatron_slm.runtime.errors import ConfigError

BLEND_FILES = (".yaml", ".yml", ".json")
BLEND_FILE_HELP = "A blend is 'prefix: weight' lines, or a list of prefixes."


def blend_arguments(value: Any, location: str) -> list[str]:
    """Return the arguments of a blend from YAML or JSON: a mapping of prefixes to weights, a list, or a string.

    Raises:
        ConfigError: ``value`` is none of these; the message names ``location``.
    """
    if value is None:
        return []
    if isinstance(value, dict):
        pairs = [(_weight(weight, f"{location}, {prefix}"), str(prefix)) for prefix, weight in value.items()]
        return [argument for pair in pairs for argument in pair]
    arguments = value if isinstance(value, list) else str(value).split()
    if isinstance(value, bool) or any(each is None or isinstance(each, bool | list | dict) for each in arguments):
        raise ConfigError(f"{location} must be a list of prefixes or weights and prefixes, not {value!r}.")
    return [str(argument) for argument in arguments]


def _weight(value: Any, location: str) -> str:
    try:
        if isinstance(value, bool):
            raise TypeError
        return str(float(value))
    except (TypeError, ValueError):
        raise ConfigError(f"{location}: the weight must be a number, not {value!r}. {BLEND_FILE_HELP}") from None


def parse_split(text: str) -> tuple[float, float, float]:
    """Return the proportions of ``--split`` for training, validation and test, normalized to a sum of 1.

    Raises:
        ConfigError: not one to three numbers of at least 0, or all of them 0.
    """
    try:
        shares = [float(number) for number in re.split(r"[,/\s]+", text.strip())]
    except ValueError:
        shares = []
    total = math.fsum(shares)
    if not 1 <= len(shares) <= 3 or not all(share >= 0 for share in shares) or not 0 < total < math.inf:
        raise ConfigError(
            f"--split {text} must be up to three proportions for training, validation and test, of at least 0 and not "
            "all 0, for example 969,30,1."
        )
    training, validation, test = (share / total for share in (*shares, 0.0, 0.0)[:3])
    return training, validation, test


def resolve_blends(data: DataConfig) -> DataConfig:
    """Return the settings with all blends, including those in files, as lists of arguments.

    Raises:
        ConfigError: an unreadable file, an invalid blend, mutually exclusive settings, or an invalid --split.
    """
    if data.split is not None:
        data = replace(data, split=data.split.strip(" '\""))  # Megatron-LM's example scripts pass literal quotes
        parse_split(data.split or "")
    if data.data_args_path is not None:
        data = _with_arguments(data, data.data_args_path)
    if data.per_split_data_args_path is not None:
        data = _with_splits(data, data.per_split_data_args_path)
    data_path = _from_file(data.data_path, "--data-path")
    train = _from_file(data.train_data_path, "--train-data-path")
    valid = {name: _from_file(blend, f"--valid-data-path {name}") for name, blend in data.valid_data_path.items()}
    blends = {"data_path": data_path, "train_data_path": train, "valid_data_path": valid}
    return replace(data, **{name: expand_paths(value) for name, value in blends.items()})


def _with_arguments(data: DataConfig, path: str) -> DataConfig:
    flag = "--data-args-path"
    _exclude(flag, {"--data-path": data.data_path, "--train-data-path": data.train_data_path})
    if not (arguments := _text(Path(path), flag).split()):
        raise ConfigError(f"{flag} {path} is empty. Write the arguments of --data-path into it.")
    return replace(data, data_path=arguments, data_args_path=None)


def _with_splits(data: DataConfig, path: str) -> DataConfig:
    flag = "--per-split-data-args-path"
    given = {"--data-path": data.data_path, "--train-data-path": data.train_data_path}
    _exclude(flag, {**given, "--valid-data-path": data.valid_data_path})
    splits = _read(Path(path), flag)
    if not isinstance(splits, dict) or not splits.get("train") or set(splits) - {"train", "valid", "test"}:
        raise ConfigError(f"{flag} {path} must contain an object with the keys train and valid, each a blend.")
    if splits.get("test"):
        raise ConfigError(f"{flag} {path}: the key test is not supported. Add the test set to --valid-data-path.")
    train = blend_arguments(splits["train"], f"{flag} {path}: train")
    valid = blend_arguments(splits.get("valid"), f"{flag} {path}: valid")
    named = {"valid": valid} if valid else {}
    return replace(data, train_data_path=train, valid_data_path=named, per_split_data_args_path=None)


def _exclude(flag: str, others: dict[str, Any]) -> None:
    for other, value in others.items():
        if value:
            raise ConfigError(f"{flag} and {other} were both given. Give one.")


def _from_file(blend: list[str], flag: str) -> list[str]:
    if len(blend) != 1 or not blend[0].lower().endswith(BLEND_FILES):
        return blend
    location = f"{flag} {blend[0]}"
    found = blend_arguments(_read(Path(blend[0]), flag), location)
    if not found:
        raise ConfigError(f"{location} is empty. {BLEND_FILE_HELP}")
    return found


def _read(path: Path, flag: str) -> Any:
    text = _text(path, flag)
    try:
        if path.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.load(text, UniqueLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}. {BLEND_FILE_HELP}") from error


def _text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {path} is not a text file.") from error


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in pairs]
    if not all(isinstance(name, Hashable) for name in names):
        raise ValueError("a key is a list or a mapping")
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return found


class UniqueLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, of which PyYAML silently takes the last."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    parts = [[loader.construct_object(part, deep=True) for part in pair] for pair in node.value]
    return _unique([(key, value) for key, value in parts])


UniqueLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
