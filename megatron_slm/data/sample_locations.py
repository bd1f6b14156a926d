"""Location of samples in their corpora, independent of the sample order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset


def locate_sample(dataset: Any, index: int) -> tuple[Any, int]:
    """Return the single-corpus dataset that contains a sample, and the index of the sample in it."""
    if not isinstance(dataset, BlendedDataset):
        return dataset, index
    corpus = dataset.datasets[dataset.dataset_index[index]]
    return corpus, int(dataset.dataset_sample_index[index])


def corpus_file(corpus: Any) -> Path:
    """Return the resolved ``.bin`` path of a single-corpus dataset."""
    return Path(f"{corpus.dataset.path_prefix}.bin").resolve()


def label_ranges(corpus: Any, index: int) -> Iterator[tuple[int, int]]:
    """Yield the token ranges [start, stop) of the labels of one sample in ``.bin``, in order.

    A sample extends from its (document, offset) in Megatron-Core's sample index to that of the next sample, plus one
    token; its labels are all its tokens but the first.
    """
    row = int(corpus.shuffle_index[index])
    (first, offset), (last, end) = corpus.sample_index[row : row + 2].tolist()
    pointers, lengths = corpus.dataset.index.sequence_pointers, corpus.dataset.index.sequence_lengths
    width = np.dtype(corpus.dataset.index.dtype).itemsize
    skip = 1  # the first token of the sample is not a label
    for number in range(first, last + 1):
        sequence = corpus.document_index[number]
        begin = int(pointers[sequence]) // width
        start = begin + (offset if number == first else 0)
        stop = begin + (end + 1 if number == last else int(lengths[sequence]))
        if skip < stop - start:
            yield start + skip, stop
        skip = max(0, skip - (stop - start))
