"""Overlap of sample orders: the number of upcoming tokens that a run has already read in the same or another order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_slm.corpus.index import chunks
from megatron_slm.data.sample_locations import corpus_file, label_ranges, locate_sample
from megatron_slm.data.usage import samples_per_corpus

SAMPLES_COMPARED = 4096  # evenly spaced if there are more


@dataclass(frozen=True)
class Overlap:
    """Hold the number of upcoming tokens and the number of those read before."""

    tokens: int
    seen: int
    is_exact: bool

    @property
    def share(self) -> float:
        return self.seen / max(self.tokens, 1)


@dataclass(frozen=True)
class ReadSamples:
    """Represent the samples [first, stop) of a training dataset that a run has read."""

    dataset: Any
    first: int
    stop: int


def order_overlap(read: Iterable[ReadSamples], dataset: Any, first: int, stop: int) -> Overlap:
    """Count the label tokens of the samples [first, stop) of ``dataset`` that were labels of samples read before.

    Args:
        read: samples read before, in any number of orders; a token that occurs in several counts once.
        dataset: the current training dataset; corpora are identified by path.
    """
    count = min(stop - first, SAMPLES_COMPARED)
    indices = np.linspace(first, stop - 1, count).round().astype(np.int64).tolist() if count > 0 else []
    places: dict[Path, list[np.ndarray]] = defaultdict(list)
    for index in indices:
        corpus, number = locate_sample(dataset, index)
        for start, end in label_ranges(corpus, number):
            places[corpus_file(corpus)].append(np.arange(start, end))
    found = {path: np.concatenate(parts) for path, parts in places.items()}
    seen = {path: np.zeros(len(each), bool) for path, each in found.items()}
    for samples in read:
        for corpus, begin, end in _corpora(samples):
            if (path := corpus_file(corpus)) in found:
                seen[path] |= _read_before(corpus, begin, end, found[path])
    tokens = sum(len(part) for part in found.values())
    scale = (stop - first) / max(count, 1)
    is_exact = count == stop - first
    return Overlap(round(tokens * scale), round(sum(int(each.sum()) for each in seen.values()) * scale), is_exact)


def _corpora(samples: ReadSamples) -> list[tuple[Any, int, int]]:
    """Return the dataset of each corpus with the range [first, stop) of its samples among ``samples``."""
    dataset = samples.dataset
    if not isinstance(dataset, BlendedDataset):
        return [(dataset, samples.first, samples.stop)]
    firsts, stops = (samples_per_corpus(dataset, count) for count in (samples.first, samples.stop))
    return list(zip(dataset.datasets, firsts, stops, strict=True))


def _read_before(corpus: Any, first: int, stop: int, places: np.ndarray) -> np.ndarray:
    """Return whether tokens of a corpus are labels of its samples [first, stop), [places] bool."""
    width = np.dtype(corpus.dataset.index.dtype).itemsize
    pointers = corpus.dataset.index.sequence_pointers
    sequences = np.searchsorted(pointers, places * width, side="right") - 1
    offsets = places - np.asarray(pointers[sequences]) // width
    is_read = np.zeros(len(corpus.sample_index), bool)  # by row of the sample index
    for part in chunks(corpus.shuffle_index[first:stop]):
        is_read[part] = True
    seen = np.zeros(len(places), bool)
    for queries, positions in _occurrences(corpus.document_index, sequences):
        rows = _rows(corpus.sample_index, positions, offsets[queries])
        hits = (rows >= 0) & is_read[rows]
        seen[queries[hits]] = True
    return seen


def _occurrences(document_index: np.ndarray, sequences: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each repetition of a sequence in the order, the query indices and the positions in the order."""
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

    The labels of a row start after its (position, offset) and end with that of the next row.
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
