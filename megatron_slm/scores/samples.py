"""Samples of Megatron-Core's GPT dataset with the reference losses of their labels, gathered from score sidecars."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_slm.data.places import label_places, locate_sample
from megatron_slm.scores.sets import ScoreSet


class ScoredSamples(Dataset):
    """The samples of ``dataset``, unchanged and in its order, with the reference scores of their labels.

    A sample has two more entries: ``reference_loss`` [s] fp32 and, with entropies, ``reference_entropy`` [s] fp32.
    The positions in the corpus come from Megatron-Core's sample indices, so that seed, epoch, blend, sequence length
    and split do not matter.

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
        corpus, corpus_index = locate_sample(self.dataset, index)
        scores = self.scores[corpus.dataset.path_prefix]
        loss, entropy = (np.zeros(len(sample["labels"]), np.float32) for _ in range(2))  # 0 beyond the corpus's end
        done = 0
        for start, stop in label_places(corpus, corpus_index):
            here = slice(done, done + stop - start)
            loss[here] = scores.losses(start, stop)
            if scores.with_entropy:
                entropy[here] = scores.entropies(start, stop)
            done = here.stop
        sample["reference_loss"] = torch.from_numpy(loss)
        if scores.with_entropy:
            sample["reference_entropy"] = torch.from_numpy(entropy)
        return sample
