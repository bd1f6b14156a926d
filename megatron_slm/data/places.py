"""Places of samples: the tokens of the corpora that a sample of a dataset holds, whatever its order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset


def locate_sample(dataset: Any, index: int) -> tuple[Any, int]:
    """Return the dataset of one corpus that a sample of a dataset comes from, and its number there."""
    if not isinstance(dataset, BlendedDataset):
        return dataset, index
    corpus = dataset.datasets[dataset.dataset_index[index]]
    return corpus, int(dataset.dataset_sample_index[index])


def corpus_file(corpus: Any) -> Path:
    """Return the ``.bin`` of the dataset of one corpus, the same for every spelling of its prefix."""
    return Path(f"{corpus.dataset.path_prefix}.bin").resolve()


def label_places(corpus: Any, index: int) -> Iterator[tuple[int, int]]:
    """Yield the places [start, stop) in ``.bin`` of the labels of one sample, in tokens, in the sample's order.

    A sample is the text from one (document, offset) of Megatron-Core's sample index to the next and one token more;
    its labels are that text without the first token.
    """
    row = int(corpus.shuffle_index[index])
    (first, offset), (last, end) = corpus.sample_index[row : row + 2].tolist()
    pointers, lengths = corpus.dataset.index.sequence_pointers, corpus.dataset.index.sequence_lengths
    width = np.dtype(corpus.dataset.index.dtype).itemsize
    skip = 1  # the first token of the sample is no label
    for number in range(first, last + 1):
        sequence = corpus.document_index[number]
        begin = int(pointers[sequence]) // width
        start = begin + (offset if number == first else 0)
        stop = begin + (end + 1 if number == last else int(lengths[sequence]))
        if skip < stop - start:
            yield start + skip, stop
        skip = max(0, skip - (stop - start))
