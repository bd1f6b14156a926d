"""GPT dataset samples with the reference losses of their labels, gathered from score sidecars."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_slm.data.sample_locations import label_ranges, locate_sample
from megatron_slm.scores.sets import ScoreSet


class ScoredSamples(Dataset):
    """Wrap a dataset and add the reference scores of the labels to each sample.

    The added entries are ``reference_loss`` [s] fp32 and, if the sidecars have entropies, ``reference_entropy`` [s]
    fp32, both in nats. Corpus positions come from Megatron-Core's sample indices, so that the scores are independent of
    seed, epoch, blend, sequence length and split.

    Args:
        dataset: Megatron-Core's GPT dataset or blended dataset.
        scores: sidecars by corpus prefix.
    """

    def __init__(self, dataset: Any, scores: ScoreSet) -> None:
        self.unscored, self.scores = dataset, scores

    def __len__(self) -> int:
        return len(self.unscored)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample: dict[str, Tensor] = self.unscored[index]
        corpus, corpus_index = locate_sample(self.unscored, index)
        scores = self.scores[corpus.dataset.path_prefix]
        loss, entropy = (np.zeros(len(sample["labels"]), np.float32) for _ in range(2))  # 0 after the corpus end
        done = 0
        for start, stop in label_ranges(corpus, corpus_index):
            here = slice(done, done + stop - start)
            loss[here] = scores.losses(start, stop)
            if scores.with_entropy:
                entropy[here] = scores.entropies(start, stop)
            done = here.stop
        sample["reference_loss"] = torch.from_numpy(loss)
        if scores.with_entropy:
            sample["reference_entropy"] = torch.from_numpy(entropy)
        return sample
