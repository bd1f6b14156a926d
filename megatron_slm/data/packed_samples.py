"""Samples of packed examples: isolated by document numbers and position ids, with a loss on masked-in labels only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_slm.corpus.index import CHUNK
from megatron_slm.corpus.loss_masks import LossMask, find_mask
from megatron_slm.data.packing import check_example_lengths, packed_indices
from megatron_slm.data.samples import CorpusSamples, LocalBuilder
from megatron_slm.runtime.errors import ConfigError


class PackedSamples(CorpusSamples):
    """Samples of the examples of one corpus, which has a loss mask; each sequence is an example.

    The tokens of a sample are its examples and padding. Tokens attend to their example only, and position ids restart
    with each example. The loss mask is that of the labels; the first token of an example is never a label.
    """

    def __init__(self, dataset: Any, prefix: str, indices: Any, num_samples: Any, split: Any, config: Any) -> None:
        self.mask = LossMask(prefix, find_mask(prefix, config.loss_mask) or config.loss_mask)
        super().__init__(dataset, prefix, indices, num_samples, split, config)
        self._pad_token_id = config.tokenizer.eod

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        text, sequences = self._query_document_sample_shuffle_indices(idx or 0)
        length = self.config.sequence_length
        examples = sequences[:-1]  # the last one ends the sample
        sizes = self.dataset.sequence_lengths[examples].astype(np.int64)
        text[sizes.sum() :] = self.config.tokenizer.eod
        sizes = np.append(sizes, length - sizes.sum())
        numbers = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        return {
            "tokens": torch.from_numpy(text[:-1].copy()),
            "labels": torch.from_numpy(text[1:].copy()),
            "documents": torch.from_numpy(numbers),
            "loss_mask": torch.from_numpy(self._label_mask(examples, length)),
            "position_ids": torch.from_numpy(np.concatenate([np.arange(size) for size in sizes])),
        }

    def samples_per_epoch(self) -> float:
        documents = self.document_index[:-1]
        return len(self) / max(int((documents == documents[0]).sum()), 1)

    def _label_mask(self, examples: np.ndarray, length: int) -> np.ndarray:
        """Return the loss mask of the labels of a sample, [length] fp32."""
        mask = np.zeros(length, np.float32)
        column = 0
        for start, size in zip(self._starts(examples), self.dataset.sequence_lengths[examples], strict=True):
            mask[column : column + size - 1] = self.mask.get(start + 1, start + size)
            column += size
        return mask

    def _starts(self, sequences: np.ndarray | slice) -> np.ndarray:
        """Return the positions of sequences in ``.bin``."""
        return self.dataset.index.sequence_pointers[sequences] // np.dtype(self.dataset.index.dtype).itemsize

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        examples = self._trained_examples()
        lengths = self.dataset.sequence_lengths[examples]
        config = self.config
        check_example_lengths(self.dataset_path, lengths, config.sequence_length)
        if not len(examples):
            raise ConfigError(
                f"{self.dataset_path}: no example of the {self.index_split.name} split has a token that contributes to "
                "the loss. Change --split, or the mask of --slm-loss-mask."
            )
        return packed_indices(
            examples, lengths, seq_length=config.sequence_length, seed=config.random_seed, samples=self.num_samples
        )

    def _trained_examples(self) -> np.ndarray:
        """Return the sequences of this split with a label that contributes to the loss."""
        found = []
        for first in range(0, len(self.indices), CHUNK // 64):
            sequences = self.indices[first : first + CHUNK // 64]
            starts, lengths = self._starts(sequences), self.dataset.sequence_lengths[sequences]
            begin = int(starts[0])
            counts = np.append(0, np.cumsum(self.mask.get(begin, int(starts[-1] + lengths[-1]))))
            found.append(sequences[counts[starts + lengths - begin] > counts[starts + 1 - begin]])
        return np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64)


class CorpusBuilder(LocalBuilder):
    """Builder that packs the examples of corpora with a loss mask."""

    @staticmethod
    def build_generic_dataset(cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any) -> Any:
        if cls is CorpusSamples:
            prefix, config = args[1], args[-1]
            if config.loss_mask is not None and find_mask(prefix, config.loss_mask):
                cls = PackedSamples
        return LocalBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)
