"""Blends: what was asked for, what a run draws from each corpus, and how often it sees it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_slm.config.schema import DataConfig
from megatron_slm.corpus.index import bin_path, chunks
from megatron_slm.runtime.errors import ConfigError

Blend = tuple[list[str], list[float] | None]


@dataclass(frozen=True)
class Drawn:
    """What one set draws from one corpus."""

    name: str  # of the set
    prefix: str
    weight: float | None  # asked for, of a sum of 1; None: as much as the corpus holds
    samples: int | None  # None where it is not known yet
    share: float  # of the set's samples
    epochs: float  # tokens drawn / tokens of the corpus' part that the set reads


def parse_blend(words: Sequence[str], flag: str = "--data-path") -> Blend:
    """Prefixes and weights from the words of ``--data-path``, by Megatron-LM's rule: pairs of weight and prefix
    where every first word is a number, else prefixes alone.

    A corpus that is named several times counts once, with the sum of its weights: two datasets over one corpus would
    read each of its samples twice.

    Raises:
        ConfigError: weights and prefixes are mixed up, a weight is not above 0, or a corpus without a weight is named
            twice.
    """
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        _refuse_repeats(words, flag)
        return list(words), None
    weights = numbers[0::2]
    if len(words) % 2 or None in weights or any(number is not None for number in numbers[1::2]):
        raise ConfigError(
            f"{flag} {' '.join(words)}: weights and prefixes come in pairs, weight first (0.3 A 0.7 B), or prefixes "
            "alone."
        )
    for weight, prefix in zip(weights, words[1::2], strict=True):
        if weight is None or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(f"{flag}: the weight of {prefix} is {weight}, and must be above 0. Or leave it out.")
    merged: dict[Hashable, tuple[str, float]] = {}
    for weight, prefix in zip(weights, words[1::2], strict=True):
        name, sum_before = merged.get(_file_identity(prefix), (prefix, 0.0))
        merged[_file_identity(prefix)] = name, sum_before + (weight or 0.0)
    return [name for name, _ in merged.values()], [weight for _, weight in merged.values()]


def training_blend(data: DataConfig) -> Blend:
    """Return the blend that a run trains on: of --train-data-path, else of --data-path. Errors as above."""
    if data.train_data_path:
        return parse_blend(data.train_data_path, "--train-data-path")
    return parse_blend(data.data_path)


def _refuse_repeats(prefixes: Sequence[str], flag: str) -> None:
    seen: dict[Hashable, str] = {}
    for prefix in prefixes:
        identity = _file_identity(prefix)
        if identity in seen:
            same = "" if seen[identity] == prefix else f" (as {seen[identity]})"
            raise ConfigError(
                f"{flag}: the corpus {prefix} is named twice{same}. Name it once; to read it more often than others, "
                "give all corpora weights."
            )
        seen[identity] = prefix


def _file_identity(prefix: str) -> Hashable:
    """Return the same value for all names of one corpus: relative and absolute paths, symbolic and hard links."""
    path = bin_path(prefix)
    try:
        status = path.stat()
    except OSError:
        return str(path.resolve())
    return status.st_dev, status.st_ino


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def shares(blend: Blend) -> list[float | None]:
    """The weights of a blend, made to a sum of 1; None where there are none."""
    prefixes, weights = blend
    return [None] * len(prefixes) if weights is None else [weight / sum(weights) for weight in weights]


def drawn(name: str, dataset: Any, blend: Blend, samples: int, seq_length: int) -> list[Drawn]:
    """What the first ``samples`` samples of a built dataset are drawn from; reads the lengths of all its documents.

    Args:
        dataset: Megatron-Core's GPT dataset, or its blend of several.
        blend: what it was built from.
    """
    if isinstance(dataset, BlendedDataset):
        parts, counts = dataset.datasets, samples_per_corpus(dataset, samples)
    else:
        parts, counts = [dataset], [samples]
    total = max(sum(counts), 1)
    return [
        Drawn(name, prefix, weight, count, count / total, count * seq_length / max(_tokens(part), 1))
        for prefix, weight, part, count in zip(blend[0], shares(blend), parts, counts, strict=True)
    ]


def samples_per_corpus(blend: BlendedDataset, samples: int) -> list[int]:
    """Return how many of the first ``samples`` samples of a built blend come from each corpus."""
    counts = np.zeros(len(blend.datasets), np.int64)
    for part in chunks(blend.dataset_index[:samples]):
        counts += np.bincount(part, minlength=len(counts))
    return counts.tolist()


def _tokens(part: Any) -> int:
    """Tokens of the sequences that a dataset reads: a run of the corpus' sequences."""
    if not len(part.indices):
        return 0
    lengths = part.dataset.sequence_lengths[int(part.indices[0]) : int(part.indices[-1]) + 1]
    return int(lengths.sum(dtype=np.int64))


def expected(name: str, blend: Blend, tokens: Sequence[int], wanted: int) -> list[Drawn]:
    """What a set will draw, from the sizes of its corpora alone.

    Args:
        tokens: of each corpus, as far as the set reads it.
        wanted: tokens that the set draws in all.
    """
    asked = shares(blend)
    given = [
        size / max(sum(tokens), 1) if weight is None else weight for weight, size in zip(asked, tokens, strict=True)
    ]
    return [
        Drawn(name, prefix, weight, None, share, share * wanted / max(size, 1))
        for prefix, weight, share, size in zip(blend[0], asked, given, tokens, strict=True)
    ]


def lines_of(rows: Sequence[Drawn]) -> list[str]:
    """A heading and one line per corpus, in columns; prefixes, which may be long, come last."""
    width = max([3, *(len(row.name) for row in rows)])
    lines = [f"{'set':<{width}}  {'weight':>8}  {'drawn':>7}  {'samples':>13}  {'epochs':>9}  corpus"]
    for row in rows:
        weight = "by size" if row.weight is None else f"{row.weight:.2%}"
        samples = "" if row.samples is None else f"{row.samples:,}"
        lines.append(
            f"{row.name:<{width}}  {weight:>8}  {row.share:>7.2%}  {samples:>13}  {row.epochs:>9.3f}  {row.prefix}"
        )
    return lines
