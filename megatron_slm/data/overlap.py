"""Overlap of two sample orders: how many of the next tokens of a run its first samples have already read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_slm.data.blends import samples_per_corpus
from megatron_slm.data.index import chunks
from megatron_slm.data.places import label_places, locate_sample

SAMPLES_COMPARED = 4096  # of more, evenly spaced ones are compared


@dataclass(frozen=True)
class Overlap:
    """Tokens that a run reads next, and those of them that were read before."""

    tokens: int
    seen: int
    is_exact: bool

    @property
    def share(self) -> float:
        return self.seen / max(self.tokens, 1)


def order_overlap(before: Any, consumed: int, after: Any, stop: int) -> Overlap:
    """Return how many label tokens of the samples [consumed, stop) of ``after`` are among the first ``consumed`` ones
    of ``before``.

    Args:
        before: the training dataset that the consumed samples were read from.
        after: the training dataset from now on; corpora are compared by their paths.
    """
    count = min(stop - consumed, SAMPLES_COMPARED)
    indices = np.linspace(consumed, stop - 1, count).round().astype(np.int64).tolist() if count > 0 else []
    places: dict[Path, list[np.ndarray]] = defaultdict(list)
    for index in indices:
        corpus, number = locate_sample(after, index)
        for start, end in label_places(corpus, number):
            places[_path(corpus)].append(np.arange(start, end))
    found = {path: np.concatenate(parts) for path, parts in places.items()}
    seen = sum(
        int(_read_before(corpus, samples, found[_path(corpus)]).sum())
        for corpus, samples in _corpora(before, consumed)
        if _path(corpus) in found
    )
    tokens = sum(len(part) for part in found.values())
    scale = (stop - consumed) / max(count, 1)
    return Overlap(round(tokens * scale), round(seen * scale), count == stop - consumed)


def _path(corpus: Any) -> Path:
    return Path(f"{corpus.dataset.path_prefix}.bin").resolve()


def _corpora(dataset: Any, consumed: int) -> list[tuple[Any, int]]:
    """Return the datasets of the corpora, and how many samples of each are among the first ``consumed`` ones."""
    if not isinstance(dataset, BlendedDataset):
        return [(dataset, consumed)]
    return list(zip(dataset.datasets, samples_per_corpus(dataset, consumed), strict=True))


def _read_before(corpus: Any, samples: int, places: np.ndarray) -> np.ndarray:
    """Return which tokens of a corpus are labels of its first ``samples`` samples, [places] bool."""
    width = np.dtype(corpus.dataset.index.dtype).itemsize
    pointers = corpus.dataset.index.sequence_pointers
    sequences = np.searchsorted(pointers, places * width, side="right") - 1
    offsets = places - np.asarray(pointers[sequences]) // width
    is_read = np.zeros(len(corpus.sample_index), bool)  # by row of the sample index
    for part in chunks(corpus.shuffle_index[:samples]):
        is_read[part] = True
    seen = np.zeros(len(places), bool)
    for queries, positions in _occurrences(corpus.document_index, sequences):
        rows = _rows(corpus.sample_index, positions, offsets[queries])
        hits = (rows >= 0) & is_read[rows]
        seen[queries[hits]] = True
    return seen


def _occurrences(document_index: np.ndarray, sequences: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each time that the order reads a sequence, the queries of it and its positions in the order."""
    wanted = np.zeros(int(sequences.max(initial=0)) + 1, bool)
    wanted[sequences] = True
    found, start = [], 0
    for part in chunks(document_index):
        inside = np.flatnonzero(part < len(wanted))
        found.append(start + inside[wanted[part[inside]]])
        start += len(part)
    positions = np.concatenate(found) if found else np.zeros(0, np.int64)
    documents = np.asarray(document_index[positions])
    order = np.argsort(documents, kind="stable")
    positions, documents = positions[order], documents[order]
    first = np.searchsorted(documents, sequences, side="left")
    count = np.searchsorted(documents, sequences, side="right") - first
    result = []
    for turn in range(int(count.max(initial=0))):
        queries = np.flatnonzero(count > turn)
        result.append((queries, positions[first[queries] + turn]))
    return result


def _rows(sample_index: np.ndarray, positions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the row whose sample has the token at (position, offset) among its labels; -1 for the first token.

    The labels of a row begin behind its own (position, offset) and end with that of the next row.
    """
    low = np.zeros(len(positions), np.int64)
    high = np.full(len(positions), len(sample_index), np.int64)
    while bool((low < high).any()):
        middle = (low + high) // 2
        rows = np.asarray(sample_index[np.minimum(middle, len(sample_index) - 1)])
        is_before = (rows[:, 0] < positions) | ((rows[:, 0] == positions) & (rows[:, 1] < offsets))
        is_open = low < high
        low = np.where(is_open & is_before, middle + 1, low)
        high = np.where(is_open & ~is_before, middle, high)
    return low - 1
