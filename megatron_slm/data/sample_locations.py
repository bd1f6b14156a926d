"""Location of samples in their corpora and documents, independent of the sample order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_slm.corpus.index import read_index
from megatron_slm.data.packed_samples import PackedSamples


def locate_sample(dataset: Any, index: int) -> tuple[Any, int]:
    """Return the single-corpus dataset that contains a sample, and the index of the sample in it."""
    if not isinstance(dataset, BlendedDataset):
        return dataset, index
    corpus = dataset.datasets[dataset.dataset_index[index]]
    return corpus, int(dataset.dataset_sample_index[index])


def corpus_file(corpus: Any) -> Path:
    """Return the resolved ``.bin`` path of a single-corpus dataset."""
    return Path(f"{corpus.dataset.path_prefix}.bin").resolve()


def token_ranges(corpus: Any, index: int) -> Iterator[tuple[int, int]]:
    """Yield the token ranges [start, stop) of one sample in ``.bin``, one per sequence, in order.

    A sample extends from its (document, offset) in Megatron-Core's sample index to that of the next sample, plus one
    token.
    """
    row = int(corpus.shuffle_index[index])
    (first, offset), (last, end) = corpus.sample_index[row : row + 2].tolist()
    pointers, lengths = corpus.dataset.index.sequence_pointers, corpus.dataset.index.sequence_lengths
    width = np.dtype(corpus.dataset.index.dtype).itemsize
    for number in range(first, last + 1):
        sequence = corpus.document_index[number]
        begin = int(pointers[sequence]) // width
        start = begin + (offset if number == first else 0)
        stop = begin + (end + 1 if number == last else int(lengths[sequence]))
        if start < stop:
            yield start, stop


def label_ranges(corpus: Any, index: int) -> Iterator[tuple[int, int]]:
    """Yield the token ranges [start, stop) of the labels of one sample in ``.bin``: all its tokens but the first."""
    skip = 1
    for start, stop in token_ranges(corpus, index):
        if skip < stop - start:
            yield start + skip, stop
        skip = 0


@dataclass(frozen=True)
class DocumentSpan:
    """Represent consecutive tokens of a sample that come from one document."""

    corpus: str  # prefix
    document: int  # number in the corpus, from 0
    offset: int  # of the first token in the document
    tokens: int


def document_spans(dataset: Any, index: int) -> list[DocumentSpan]:
    """Return the documents of a sample in the order of its tokens; an empty list for data without documents.

    Args:
        dataset: Megatron-Core's GPT dataset or blended dataset; a wrapper of one has it as ``unscored``.
        index: number of the sample.
    """
    corpus, corpus_index = locate_sample(getattr(dataset, "unscored", dataset), index)
    if not isinstance(getattr(corpus, "dataset", None), IndexedDataset):
        return []
    prefix = corpus.dataset.path_prefix
    documents = read_index(prefix)
    width = documents.dtype.itemsize
    ranges = list(token_ranges(corpus, corpus_index))
    if isinstance(corpus, PackedSamples):
        ranges.pop()  # the first token of the next sample, which is padding in this one
    spans = []
    for start, stop in ranges:
        # Not np.searchsorted, which copies the complete array: the arrays of an index file are not aligned.
        sequence = bisect_right(documents.pointers, start * width) - 1
        document = bisect_right(documents.boundaries, sequence) - 1
        first = int(documents.pointers[documents.boundaries[document]]) // width
        spans.append(DocumentSpan(prefix, document, start - first, stop - start))
    return spans
