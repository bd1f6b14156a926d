"""Sample order of ``--data-order stable``, which shuffles each epoch independently.

Epoch e shuffles the documents with a generator seeded by (--seed, e), splits their text into samples, and shuffles the
samples. The first samples of a run are therefore independent of its length, and each epoch reads every sample exactly
once; up to --seq-length tokens at the end of each epoch are dropped. Megatron-LM's order shuffles all epochs with one
generator, so that a longer run has a different order from its first sample on.

A blend interleaves its corpora in proportion to their weights, each corpus in its stable order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from megatron.core.datasets import helpers

from megatron_slm.runtime.errors import ConfigError


def stable_indices(samples: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Build the document, sample and shuffle index of a GPT dataset in Megatron-Core's format.

    The sample index has one more row than samples in each epoch, so that no sample crosses an epoch boundary.

    Raises:
        ConfigError: an epoch is shorter than a sample.
    """
    length, seed = samples.config.sequence_length, samples.config.random_seed
    tokens = int(samples.dataset.sequence_lengths[samples.indices].sum(dtype=np.int64))
    per_epoch = (tokens - 1) // length
    if per_epoch < 1:
        raise ConfigError(
            f"{samples.dataset_path}: {tokens:,} tokens are too few for one sample of --seq-length {length} plus one "
            "label. Omit the corpus, or use --data-order megatron, which joins several epochs."
        )
    epochs = 1 if samples.num_samples is None else max(-(-samples.num_samples // per_epoch), 1)
    parts = [_epoch(samples, seed, epoch, tokens) for epoch in range(epochs)]
    documents = len(samples.indices)
    document_index = np.concatenate([part[0] for part in parts])
    starts = [np.array([epoch * documents, 0], np.int64) for epoch in range(epochs)]
    sample_index = np.concatenate([part[1] + start for part, start in zip(parts, starts, strict=True)])
    shuffle_index = np.concatenate([part[2] + epoch * (per_epoch + 1) for epoch, part in enumerate(parts)])
    return document_index, sample_index, shuffle_index


def _epoch(samples: Any, seed: int, epoch: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Build the indices of one epoch, starting from 0."""
    rng = np.random.RandomState([seed, epoch])
    document_index = np.array(samples.indices, np.int32)
    rng.shuffle(document_index)
    lengths = np.array(samples.dataset.sequence_lengths)  # Megatron-Core's helper needs it writeable and in memory
    sample_index = helpers.build_sample_idx(lengths, document_index, samples.config.sequence_length, 1, tokens, True, 1)
    shuffle_index = np.arange(len(sample_index) - 1, dtype=np.int64)
    rng.shuffle(shuffle_index)
    return document_index, sample_index, shuffle_index
