"""Megatron-Core's GPT dataset, with content-addressed caching of sample indices, id validation and sample orders."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_slm.corpus.index import joined_documents, read_index
from megatron_slm.data.index_cache import cached_arrays
from megatron_slm.data.stable_order import stable_indices
from megatron_slm.runtime.errors import ConfigError

INDICES = ("document_index", "sample_index", "shuffle_index")
BLEND_INDICES = ("dataset_index", "dataset_sample_index")
IN_MEMORY = ""  # cache path that disables Megatron-Core's cache


@dataclass
class SamplesConfig(GPTDatasetConfig):
    """Extend Megatron-Core's dataset settings."""

    identities: dict[str, str] = field(default_factory=dict)  # corpus identities, by prefix
    cache_directory: str | None = None  # None: in the directory of each corpus
    data_order: str = "megatron"
    join_sentences: bool = False
    loss_mask: str | None = None  # name of the loss mask of packed corpora
    corpus_identity: str = ""  # identity of a single corpus; set by its dataset

    def __post_init__(self) -> None:
        super().__post_init__()
        self.path_to_cache = IN_MEMORY


class CorpusSamples(GPTDataset):
    """Samples of one corpus.

    The corpus identity is part of the description that keys the cached indices, so that rebuilding a corpus under the
    same name invalidates them.
    """

    def __init__(self, dataset: Any, prefix: str, indices: Any, num_samples: Any, split: Any, config: Any) -> None:
        config = copy.copy(config)
        config.corpus_identity = config.identities.get(prefix, "")
        super().__init__(dataset, prefix, indices, num_samples, split, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "corpus_identity", "data_order", "join_sentences", "loss_mask"]

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> IndexedDataset:
        dataset = GPTDataset.build_low_level_dataset(dataset_path, config)
        if config.join_sentences:
            _join_sentences(dataset)
        return dataset

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """Return a sample, with the number of the document of each token for --reset-attention-mask."""
        sample = super().__getitem__(idx)
        if self.config.reset_attention_mask:
            ends = sample["tokens"] == self.config.tokenizer.eod
            sample["documents"] = (ends.cumsum(0) - ends.long()).int()
        return sample

    def _cache_directory(self) -> str | None:
        config = cast(SamplesConfig, self.config)
        return config.cache_directory or str(Path(self.dataset.path_prefix) / "cache" / "sample_indices")

    def samples_per_epoch(self) -> float:
        """Return the number of samples in one epoch."""
        return max(split_tokens(self), 1) / self.config.sequence_length

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        key = f"{self.unique_description_hash}-{self.index_split.name}"
        arrays = cached_arrays(self._cache_directory(), key, self.unique_description, INDICES, self._build_indices)
        return cast(tuple[np.ndarray, np.ndarray, np.ndarray], arrays)

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Build the document, sample and shuffle index."""
        if self.config.data_order == "stable":
            return stable_indices(self)
        return super()._build_document_sample_shuffle_indices()

    def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
        found = super()._query_document_sample_shuffle_indices(idx)
        ids, size = found[0], self.config.tokenizer.vocab_size
        for token in (int(ids.min()), int(ids.max())) if len(ids) else ():
            if not 0 <= token < size:
                raise ConfigError(
                    f"{self.dataset_path}: a document among the sequences {int(found[1][0])} to {int(found[1][-1])} "
                    f"has the token id {token}, but the vocabulary has {size} entries. Use the tokenizer that made the "
                    "corpus; tools/inspect_dataset.py --check finds all such ids."
                )
        return found


def split_tokens(corpus: Any) -> int:
    """Return the number of tokens in the split of a corpus, which is a contiguous range of its sequences."""
    if not len(corpus.indices):
        return 0
    lengths = corpus.dataset.sequence_lengths[int(corpus.indices[0]) : int(corpus.indices[-1]) + 1]
    return int(lengths.sum(dtype=np.int64))


class MockSamples(CorpusSamples):
    """Megatron-Core's mock data: reproducible counting sequences of random lengths, without a corpus."""

    numel_low_level_dataset = staticmethod(MockGPTDataset.numel_low_level_dataset)
    build_low_level_dataset = staticmethod(MockGPTDataset.build_low_level_dataset)

    def _cache_directory(self) -> str | None:
        return cast(SamplesConfig, self.config).cache_directory


class CorpusBlend(BlendedDataset):
    """Samples of several corpora; the order is cached if there is a cache directory."""

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        key = f"{self.unique_description_hash}-{self.split.name}"
        build, directory = super()._build_indices, self.config.cache_directory
        arrays = cached_arrays(directory, key, self.unique_description, BLEND_INDICES, build)
        return cast(tuple[np.ndarray, np.ndarray], arrays)


class LocalBuilder(BlendedMegatronDatasetBuilder):
    """Megatron-Core's builder without synchronization: the caller orders the ranks and broadcasts errors."""

    @staticmethod
    def build_generic_dataset(cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any) -> Any:
        return (CorpusBlend if cls is BlendedDataset else cls)(*args)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[Any], sizes_per_dataset: list[list[Any]]
    ) -> list[list[Any]]:
        built = [
            self._build_megatron_dataset_splits(prefix, split, sizes, False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(column) for column in zip(*built, strict=True)]


def _join_sentences(dataset: IndexedDataset) -> None:
    """Replace the sequences of a dataset by its documents."""
    index = dataset.index
    index.sequence_lengths, index.sequence_pointers = joined_documents(read_index(dataset.path_prefix))
    index.sequence_count = len(index.sequence_lengths)
    index.document_indices = np.arange(index.sequence_count + 1, dtype=np.int64)
