"""Samples of Megatron-Core's GPT dataset with the reference losses of their labels, gathered from score sidecars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from torch import Tensor
from torch.utils.data import Dataset

from megatron_slm.data.scores.sets import ScoreSet


class ScoredSamples(Dataset):
    """The samples of ``dataset``, unchanged and in its order, and what the sidecars say of their labels.

    A sample has two more entries: ``reference_loss`` [s] fp32 and, with entropies, ``reference_entropy`` [s] fp32.
    Megatron-Core's own indices tell which places of the corpus a sample holds, so that it does not matter how they
    came about: seed, epoch, blend, sequence length, or split.

    Args:
        dataset: one corpus, or a blend of several.
        scores: sidecars by the prefix of the corpus.
    """

    def __init__(self, dataset: Any, scores: ScoreSet) -> None:
        self.dataset, self.scores = dataset, scores

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample: dict[str, Tensor] = self.dataset[index]
        corpus, own_index = self._locate(index)
        scores = self.scores[corpus.dataset.path_prefix]
        labels = sample["labels"].numpy()
        loss, entropy = (np.zeros(len(labels), np.float32) for _ in range(2))  # 0 beyond the end of the corpus
        done = 0
        for start, stop in label_places(corpus, own_index):
            here = slice(done, done + stop - start)
            loss[here] = scores.losses(start, stop, labels[here])
            if scores.with_entropy:
                entropy[here] = scores.entropies(start, stop)
            done = here.stop
        sample["reference_loss"] = torch.from_numpy(loss)
        if scores.with_entropy:
            sample["reference_entropy"] = torch.from_numpy(entropy)
        return sample

    def _locate(self, index: int) -> tuple[Any, int]:
        """The dataset of one corpus that a sample comes from, and its number there."""
        if not isinstance(self.dataset, BlendedDataset):
            return self.dataset, index
        corpus = self.dataset.datasets[self.dataset.dataset_index[index]]
        return corpus, int(self.dataset.dataset_sample_index[index])


def label_places(corpus: Any, index: int) -> Iterator[tuple[int, int]]:
    """The places [start, stop) in ``.bin`` of the labels of one sample, counted in tokens, in the sample's order.

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
