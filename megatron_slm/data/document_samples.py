"""Samples that contain a given document, for any order, blend, number of epochs and packing."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_slm.corpus.index import CHUNK, read_index
from megatron_slm.data.sample_locations import DocumentSpan, document_spans


def samples_of_document(dataset: Any, prefix: str, document: int) -> Iterator[tuple[int, DocumentSpan]]:
    """Yield each sample of a dataset that contains tokens of a document, and these tokens, in the order of the samples.

    Args:
        dataset: Megatron-Core's GPT dataset or blended dataset.
        prefix: corpus of the document, as the dataset names it.
        document: number in the corpus, from 0.
    """
    for sample in sorted(_candidates(dataset, prefix, document)):
        for span in document_spans(dataset, sample):
            if (span.corpus, span.document) == (prefix, document):
                yield sample, span


def _candidates(dataset: Any, prefix: str, document: int) -> Iterator[int]:
    """Yield samples that may contain the document: all that do, and perhaps neighbors."""
    is_blend = isinstance(dataset, BlendedDataset)
    for place, corpus in enumerate(dataset.datasets if is_blend else [dataset]):
        if corpus.dataset.path_prefix != prefix:
            continue
        numbers = _numbers(corpus.shuffle_index, _rows(corpus, document))
        if not is_blend:
            yield from numbers[numbers < len(dataset)].tolist()
            continue
        for start in range(0, len(dataset), CHUNK):
            of_corpus = dataset.dataset_index[start : start + CHUNK] == place
            is_wanted = of_corpus & np.isin(dataset.dataset_sample_index[start : start + CHUNK], numbers)
            yield from (start + np.flatnonzero(is_wanted)).tolist()


def _rows(corpus: Any, document: int) -> set[int]:
    """Return the rows of the sample index that overlap with the document's sequences in the document index."""
    index = read_index(corpus.dataset.path_prefix)
    first, last = (int(index.boundaries[number]) for number in (document, document + 1))
    if first == last:
        return set()  # an empty document
    begin = int(index.pointers[first])
    end = int(index.pointers[last]) if last < index.sequences else index.tokens() * index.dtype.itemsize
    pointers = corpus.dataset.index.sequence_pointers  # of documents if sentences are joined
    low, high = bisect_left(pointers, begin), bisect_left(pointers, end)
    samples, rows = corpus.sample_index, set[int]()
    for start in range(0, len(corpus.document_index), CHUNK):
        part = corpus.document_index[start : start + CHUNK]
        for position in (start + np.flatnonzero((part >= low) & (part < high))).tolist():
            count = len(samples)
            before = bisect_left(range(1, count), position, key=lambda row: int(samples[row, 0]))
            after = bisect_right(range(count - 1), position, key=lambda row: int(samples[row, 0]))
            rows.update(range(before, after))
    return rows


def _numbers(shuffle_index: Any, rows: set[int]) -> np.ndarray:
    """Return the numbers of the samples that are read from rows of the sample index."""
    wanted = np.fromiter(rows, np.int64, len(rows))
    found = [
        start + np.flatnonzero(np.isin(shuffle_index[start : start + CHUNK], wanted))
        for start in range(0, len(shuffle_index), CHUNK)
    ]
    return np.concatenate(found) if found else np.zeros(0, np.int64)
