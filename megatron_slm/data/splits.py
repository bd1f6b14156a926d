"""Training, validation and test splits of a corpus (--split), and their validation.

Megatron-Core repeats a split until it has the requested number of samples, and never terminates for an empty split. A
blend without weights is read for one epoch, to which every corpus must contribute a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix

from megatron_slm.config.blends import parse_split
from megatron_slm.config.schema import DataConfig
from megatron_slm.corpus.index import joined_documents, read_index
from megatron_slm.data.blends import Blend, parse_blend, training_blend
from megatron_slm.data.usage import DatasetUsage, estimate_usage
from megatron_slm.runtime.errors import ConfigError

DEFAULT_SPLIT = "969, 30, 1"  # Megatron-LM's
SPLITS = ("training", "validation", "test")


def wants_split(data: DataConfig, valid_samples: int) -> bool:
    """Return whether the validation set is a split of --data-path."""
    return not (data.train_data_path or data.valid_data_path) and valid_samples > 0


def effective_split(data: DataConfig) -> str:
    """Return the effective --split of --data-path."""
    return data.split or ("1, 0, 0" if data.valid_data_path else DEFAULT_SPLIT)


def split_matrix(data: DataConfig) -> list[tuple[float, float] | None]:
    """Return the interval of each split of --data-path as fractions; None for an empty split."""
    matrix: list[tuple[float, float] | None] = convert_split_vector_to_split_matrix(
        list(parse_split(effective_split(data)))
    )
    return matrix


def estimate_training_usage(
    data: DataConfig, *, train_samples: int, valid_samples: int, seq_length: int
) -> list[DatasetUsage]:
    """Estimate the training usage of each corpus from its size, before any index is built.

    Raises:
        ConfigError: a corpus is too small for a sample.
    """
    tokens = check_splits(data, valid_samples=valid_samples, seq_length=seq_length)
    if data.mock_data:
        return []
    return estimate_usage("train", training_blend(data), tokens, samples=train_samples, seq_length=seq_length)


def check_splits(data: DataConfig, *, valid_samples: int, seq_length: int, trains: bool = True) -> list[int]:
    """Validate the size of every split that the run reads, and return the training tokens of each corpus.

    Args:
        trains: False for a run that only evaluates, which reads the validation and test splits.

    Raises:
        ConfigError: a split of a corpus is too small.
    """
    if data.mock_data:
        return []
    if data.slm_loss_mask is not None:
        seq_length = 0  # samples of packed examples are padded
    for name, arguments in data.valid_data_path.items():
        flag = f"--valid-data-path {name}"
        blend = parse_blend(arguments, flag)
        _check_epoch(flag, blend, [_tokens(prefix, (0.0, 1.0), data) for prefix in blend[0]], seq_length)
    if not trains:
        _check_held_out(data, valid_samples, seq_length)
        return []
    blend = training_blend(data)
    if data.train_data_path:
        flag = "--train-data-path"
        tokens = [_tokens(prefix, (0.0, 1.0), data) for prefix in blend[0]]
    else:
        flag = "--data-path"
        tokens = _split_tokens(data, blend, 0)
        if wants_split(data, valid_samples) and split_matrix(data)[1] is not None:
            _check_epoch(flag, blend, _split_tokens(data, blend, 1), seq_length)
    _check_epoch(flag, blend, tokens, seq_length)
    return tokens


def _check_held_out(data: DataConfig, valid_samples: int, seq_length: int) -> None:
    if wants_split(data, valid_samples):
        blend, matrix = parse_blend(data.data_path), split_matrix(data)
        for split in (1, 2):
            if matrix[split] is not None:
                _check_epoch("--data-path", blend, _split_tokens(data, blend, split), seq_length)


def _split_tokens(data: DataConfig, blend: Blend, split: int) -> list[int]:
    bounds = split_matrix(data)[split]
    tokens = [_tokens(prefix, bounds or (0.0, 0.0), data) for prefix in blend[0]]
    for prefix, count in zip(blend[0], tokens, strict=True):
        if not count:
            raise ConfigError(
                f"--data-path {prefix}: --split {effective_split(data)} leaves none of {_lengths(prefix, data).size:,} "
                f"sequences for {SPLITS[split]}. Change --split, or use the entire corpus for training (--split 1,0,0) "
                "and other corpora for validation (--valid-data-path)."
            )
    return tokens


def _tokens(prefix: str, bounds: tuple[float, float], data: DataConfig) -> int:
    """Return the number of tokens in a fraction of a corpus, with Megatron-Core's rounding to sequences."""
    lengths = _lengths(prefix, data)
    first, last = (round(bound * float(len(lengths))) for bound in bounds)
    return int(lengths[first:last].sum(dtype=np.int64))


def _lengths(prefix: str, data: DataConfig) -> np.ndarray:
    """Return the length of each sequence, or of each document for --slm-sentences join."""
    index = read_index(prefix)
    return joined_documents(index)[0] if data.slm_sentences == "join" else index.lengths


def _check_epoch(flag: str, blend: Blend, tokens: Sequence[int], seq_length: int) -> None:
    """Raise ConfigError if a corpus of a blend without weights has no sample; a ``seq_length`` of 0 accepts all."""
    prefixes, weights = blend
    if len(prefixes) == 1 or weights is not None:
        return
    for prefix, count in zip(prefixes, tokens, strict=True):
        if count <= seq_length and seq_length:
            raise ConfigError(
                f"{flag} {prefix}: {count:,} tokens are too few for one sample of --seq-length {seq_length} plus one "
                "label. Omit the corpus, or add weights so that it is repeated."
            )
