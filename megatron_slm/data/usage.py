"""Dataset usage: samples, share and epochs of each corpus in a run, estimated before or measured after indexing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_slm.corpus.index import chunks
from megatron_slm.data.blends import Blend, normalized_weights


@dataclass(frozen=True)
class DatasetUsage:
    """Usage of one corpus by one dataset."""

    name: str  # of the dataset
    prefix: str
    weight: float | None  # requested weight, of a sum of 1; None: proportional to the corpus size
    samples: int
    share: float  # of the dataset's samples
    epochs: float  # tokens sampled / tokens of the split of the corpus


def measure_usage(name: str, dataset: Any, blend: Blend, samples: int) -> list[DatasetUsage]:
    """Return the usage of each corpus by the first ``samples`` samples of a built dataset; reads all document lengths.

    Args:
        dataset: Megatron-Core's GPT dataset or blended dataset.
        blend: blend from which it was built.
    """
    if isinstance(dataset, BlendedDataset):
        corpora, counts = dataset.datasets, samples_per_corpus(dataset, samples)
    else:
        corpora, counts = [dataset], [samples]
    total = max(sum(counts), 1)
    return [
        DatasetUsage(name, prefix, weight, count, count / total, count / corpus.samples_per_epoch())
        for prefix, weight, corpus, count in zip(blend[0], normalized_weights(blend), corpora, counts, strict=True)
    ]


def estimate_usage(
    name: str, blend: Blend, tokens: Sequence[int], *, samples: int, seq_length: int
) -> list[DatasetUsage]:
    """Estimate the usage of each corpus by a dataset from the corpus sizes.

    Args:
        tokens: tokens of the split of each corpus.
        samples: total samples of the dataset.
        seq_length: tokens of a sample.
    """
    weights = normalized_weights(blend)
    given = [
        size / max(sum(tokens), 1) if weight is None else weight for weight, size in zip(weights, tokens, strict=True)
    ]
    return [
        DatasetUsage(name, prefix, weight, round(share * samples), share, share * samples * seq_length / max(size, 1))
        for prefix, weight, share, size in zip(blend[0], weights, given, tokens, strict=True)
    ]


def format_usage(rows: Sequence[DatasetUsage]) -> list[str]:
    """Return a table with a heading and one line per corpus; prefixes, which may be long, are the last column."""
    width = max([3, *(len(row.name) for row in rows)])
    lines = [f"{'set':<{width}}  {'weight':>8}  {'drawn':>7}  {'samples':>13}  {'epochs':>9}  corpus"]
    for row in rows:
        weight = "by size" if row.weight is None else f"{row.weight:.2%}"
        lines.append(
            f"{row.name:<{width}}  {weight:>8}  {row.share:>7.2%}  {row.samples:>13,}  {row.epochs:>9.3f}  {row.prefix}"
        )
    return lines


def samples_per_corpus(blend: BlendedDataset, samples: int) -> list[int]:
    """Return the number of samples of each corpus among the first ``samples`` samples of a built blend."""
    counts = np.zeros(len(blend.datasets), np.int64)
    for indices in chunks(blend.dataset_index[:samples]):
        counts += np.bincount(indices, minlength=len(counts))
    return counts.tolist()
