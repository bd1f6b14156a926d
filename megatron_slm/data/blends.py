"""Blends of corpora: parsing of ``--data-path`` arguments, weights and selection ratios of corpora."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path

from megatron_slm.config.schema import DataConfig
from megatron_slm.corpus.index import bin_path
from megatron_slm.runtime.errors import ConfigError

Blend = tuple[list[str], list[float] | None]  # prefixes and weights


def parse_blend(arguments: Sequence[str], flag: str = "--data-path") -> Blend:
    """Parse the arguments of ``--data-path`` by Megatron-LM's rule.

    They are pairs of weight and prefix if every other argument is a number, and otherwise prefixes. Repetitions of a
    corpus are merged by adding their weights, since separate datasets over one corpus would read each sample twice.

    Raises:
        ConfigError: weights and prefixes are not in pairs, a weight is not above 0, or a corpus without a weight is
            named twice.
    """
    numbers = [_parse_number(argument) for argument in arguments]
    if all(number is None for number in numbers):
        _reject_repeats(arguments, flag)
        return list(arguments), None
    weights = numbers[0::2]
    if len(arguments) % 2 or None in weights or any(number is not None for number in numbers[1::2]):
        raise ConfigError(
            f"{flag} {' '.join(arguments)}: expected pairs of weight and prefix (0.3 A 0.7 B), or prefixes alone."
        )
    merged: dict[Hashable, tuple[str, float]] = {}
    for weight, prefix in zip(weights, arguments[1::2], strict=True):
        if weight is None or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(f"{flag}: the weight of {prefix} is {weight}, but must be above 0. Or omit the corpus.")
        name, sum_before = merged.get(file_identity(prefix), (prefix, 0.0))
        merged[file_identity(prefix)] = name, sum_before + weight
    return [name for name, _ in merged.values()], [weight for _, weight in merged.values()]


def training_blend(data: DataConfig) -> Blend:
    """Return the training blend: --train-data-path if set, otherwise --data-path.

    Raises:
        ConfigError: see :func:`parse_blend`.
    """
    if data.train_data_path:
        return parse_blend(data.train_data_path, "--train-data-path")
    return parse_blend(data.data_path)


def normalized_weights(blend: Blend) -> list[float | None]:
    """Return the weights of a blend scaled to a sum of 1, or None for each corpus of a blend without weights."""
    prefixes, weights = blend
    return [None] * len(prefixes) if weights is None else [weight / sum(weights) for weight in weights]


def locate_corpus(name: str, prefixes: Sequence[str], flag: str) -> int:
    """Return the first position of the corpus with this prefix or, if that is unique, with this last part of it.

    Raises:
        ConfigError: no corpus or several have the name.
    """
    found = [place for place, prefix in enumerate(prefixes) if file_identity(prefix) == file_identity(name)]
    found = found or [place for place, prefix in enumerate(prefixes) if Path(prefix).name == name]
    if len({file_identity(prefixes[place]) for place in found}) != 1:
        problem = "is the name of several corpora" if found else "is not a corpus of the run"
        raise ConfigError(f"{flag}: {name} {problem}. Its corpora are {', '.join(prefixes) or 'mock data'}.")
    return found[0]


def parse_corpus_ratios(arguments: Sequence[str], prefixes: Sequence[str], flag: str) -> tuple[float | None, ...]:
    """Parse pairs of a selection ratio and a corpus; return the ratio of each corpus of the blend, None if not given.

    Raises:
        ConfigError: arguments are not in pairs, a ratio is outside of (0, 1], a corpus is unknown or named twice, or
            the blend has one corpus.
    """
    if len(prefixes) < 2:
        raise ConfigError(f"{flag} needs a blend of several corpora. Use --slm-selection-ratio for one corpus.")
    numbers = [_parse_number(argument) for argument in arguments[0::2]]
    if len(arguments) % 2 or not all(number is not None and 0 < number <= 1 for number in numbers):
        raise ConfigError(
            f"{flag} {' '.join(arguments)}: expected pairs of a ratio in (0, 1] and a corpus, for example 0.4 web 0.8 "
            "math."
        )
    ratios: list[float | None] = [None] * len(prefixes)
    for ratio, name in zip(numbers, arguments[1::2], strict=True):
        place = locate_corpus(name, prefixes, flag)
        if ratios[place] is not None:
            raise ConfigError(f"{flag}: the corpus {name} is named twice. Give it one ratio.")
        ratios[place] = ratio
    return tuple(ratios)


def _reject_repeats(prefixes: Sequence[str], flag: str) -> None:
    seen: dict[Hashable, str] = {}
    for prefix in prefixes:
        identity = file_identity(prefix)
        if identity in seen:
            same = "" if seen[identity] == prefix else f" (as {seen[identity]})"
            raise ConfigError(
                f"{flag}: the corpus {prefix} is named twice{same}. Name it once; to read it more often than others, "
                "give all corpora weights."
            )
        seen[identity] = prefix


def file_identity(prefix: str) -> Hashable:
    """Return the same value for all names of one corpus: relative and absolute paths, symbolic and hard links."""
    path = bin_path(prefix)
    try:
        status = path.stat()
    except OSError:
        return str(path.resolve())
    return status.st_dev, status.st_ino


def _parse_number(argument: str) -> float | None:
    try:
        return float(argument)
    except ValueError:
        return None
