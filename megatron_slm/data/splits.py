"""The splits of a corpus by --split for training, validation and test, and their validation.

Megatron-Core makes samples of a split until there are as many as requested: with a split without tokens it never ends.
Of several corpora without weights it takes one epoch, to which each must contribute a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix

from megatron_slm.config.blends import parse_split
from megatron_slm.config.schema import DataConfig
from megatron_slm.corpus.index import joined_documents, read_index
from megatron_slm.data.blends import Blend, Drawn, expected, parse_blend, training_blend
from megatron_slm.runtime.errors import ConfigError

DEFAULT_SPLIT = "969, 30, 1"  # Megatron-LM's
SPLITS = ("training", "validation", "test")


def wants_split(data: DataConfig, valid_samples: int) -> bool:
    """Return whether --data-path gives the validation set, too."""
    return not (data.train_data_path or data.valid_data_path) and valid_samples > 0


def split_of(data: DataConfig) -> str:
    """Return the shares of --data-path for training, validation and test, as text."""
    return data.split or ("1, 0, 0" if data.valid_data_path else DEFAULT_SPLIT)


def split_matrix(data: DataConfig) -> list[tuple[float, float] | None]:
    """Return the first and last share of each split of --data-path; None for an empty split."""
    matrix: list[tuple[float, float] | None] = convert_split_vector_to_split_matrix(list(parse_split(split_of(data))))
    return matrix


def expected_drawn(data: DataConfig, *, train_samples: int, valid_samples: int, seq_length: int) -> list[Drawn]:
    """Return the usage of each corpus by the run, estimated from its size before any index is built.

    Raises:
        ConfigError: a corpus is too small for a sample.
    """
    tokens = check_splits(data, valid_samples=valid_samples, seq_length=seq_length)
    return [] if data.mock_data else expected("train", training_blend(data), tokens, train_samples * seq_length)


def check_splits(data: DataConfig, *, valid_samples: int, seq_length: int, trains: bool = True) -> list[int]:
    """Check that every split that the run reads is large enough; return the training tokens of each corpus.

    Args:
        trains: False for a run that only evaluates: it reads the validation and the test split.

    Raises:
        ConfigError: a split of a corpus is too small.
    """
    if data.mock_data:
        return []
    for name, words in data.valid_data_path.items():
        flag = f"--valid-data-path {name}"
        blend = parse_blend(words, flag)
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
                f"--data-path {prefix}: --split {split_of(data)} leaves no sequence of {_lengths(prefix, data).size:,} "
                f"for {SPLITS[split]}. Give other shares, or all to training (--split 1,0,0) and held-out text with "
                "--valid-data-path."
            )
    return tokens


def _tokens(prefix: str, bounds: tuple[float, float], data: DataConfig) -> int:
    """Return the tokens of a share of the sequences of a corpus, rounded as Megatron-Core rounds it."""
    lengths = _lengths(prefix, data)
    first, last = (round(bound * float(len(lengths))) for bound in bounds)
    return int(lengths[first:last].sum(dtype=np.int64))


def _lengths(prefix: str, data: DataConfig) -> np.ndarray:
    """Return the tokens of each sequence, or of each document with --slm-sentences join."""
    index = read_index(prefix)
    return joined_documents(index)[0] if data.slm_sentences == "join" else index.lengths


def _check_epoch(flag: str, blend: Blend, tokens: Sequence[int], seq_length: int) -> None:
    prefixes, weights = blend
    if len(prefixes) == 1 or weights is not None:
        return
    for prefix, count in zip(prefixes, tokens, strict=True):
        if count <= seq_length:
            raise ConfigError(
                f"{flag} {prefix}: {count:,} tokens are too few for one sample of --seq-length {seq_length} and the "
                "label behind it. Leave the corpus out, or give weights: the corpus is then repeated."
            )
