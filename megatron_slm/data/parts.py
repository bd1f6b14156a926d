"""The parts of a corpus that --split gives to training and validation, and whether they are enough to read from.

Megatron-Core makes samples of a part until there are as many as asked for: of a part without tokens it would never make
an end, and of several corpora without weights it takes one epoch, of which each must hold a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from megatron_slm.config.schema import DataConfig
from megatron_slm.data.blends import Blend, Drawn, expected, parse_blend
from megatron_slm.data.index import read_index
from megatron_slm.runtime.errors import ConfigError

DEFAULT_SPLIT = "969, 30, 1"  # Megatron-LM's
PARTS = ("training", "validation")


def wants_split(data: DataConfig, valid_samples: int) -> bool:
    """Whether --data-path gives the validation set, too."""
    return not (data.train_data_path or data.valid_data_path) and valid_samples > 0


def split_of(data: DataConfig, valid_samples: int) -> str:
    """The shares of --data-path for training, validation and test."""
    return data.split or (DEFAULT_SPLIT if wants_split(data, valid_samples) else "1, 0, 0")


def expected_drawn(data: DataConfig, *, train_samples: int, valid_samples: int, seq_length: int) -> list[Drawn]:
    """What the run will take from each corpus, from their sizes alone, before any index is built.

    Raises:
        ConfigError: a corpus holds too little to make a sample of.
    """
    tokens = check_parts(data, valid_samples=valid_samples, seq_length=seq_length)
    return expected("train", parse_blend(data.train_data_path or data.data_path), tokens, train_samples * seq_length)


def check_parts(data: DataConfig, *, valid_samples: int, seq_length: int) -> list[int]:
    """Make sure that samples can be made of all that the run reads; tokens of each corpus for training.

    Raises:
        ConfigError: a part of a corpus holds too little.
    """
    for name, words in data.valid_data_path.items():
        flag = f"--valid-data-path {name}"
        blend = parse_blend(words, flag)
        _check_epoch(flag, blend, [_tokens(prefix, (0.0, 1.0)) for prefix in blend[0]], seq_length)
    if data.train_data_path:
        flag, blend = "--train-data-path", parse_blend(data.train_data_path, "--train-data-path")
        tokens = [_tokens(prefix, (0.0, 1.0)) for prefix in blend[0]]
    else:
        flag, blend = "--data-path", parse_blend(data.data_path)
        tokens = _part_tokens(data, valid_samples, blend, 0)
        bounds = convert_split_vector_to_split_matrix(_shares(split_of(data, valid_samples)))
        if wants_split(data, valid_samples) and bounds[1] is not None:
            _check_epoch(flag, blend, _part_tokens(data, valid_samples, blend, 1), seq_length)
    _check_epoch(flag, blend, tokens, seq_length)
    return tokens


def _shares(split: str) -> list[float]:
    try:
        with np.errstate(invalid="ignore"):
            shares = parse_and_normalize_split(split)
    except (AssertionError, ValueError):
        shares = []
    if not shares or not all(np.isfinite(shares)):
        raise ConfigError(f"--split {split} should be up to three shares, not all 0, for example 969,30,1.")
    return shares


def _part_tokens(data: DataConfig, valid_samples: int, blend: Blend, part: int) -> list[int]:
    split = split_of(data, valid_samples)
    bounds = convert_split_vector_to_split_matrix(_shares(split))[part]
    tokens = [_tokens(prefix, bounds or (0.0, 0.0)) for prefix in blend[0]]
    for prefix, count in zip(blend[0], tokens, strict=True):
        if not count:
            raise ConfigError(
                f"--data-path {prefix}: --split {split} leaves no sequence of {len(read_index(prefix).lengths):,} for "
                f"{PARTS[part]}. Give other shares, or all to training (--split 1,0,0) and held-out text with "
                "--valid-data-path."
            )
    return tokens


def _tokens(prefix: str, bounds: tuple[float, float]) -> int:
    """Tokens of a share of the sequences of a corpus, rounded as Megatron-Core rounds it."""
    lengths = read_index(prefix).lengths
    first, last = (round(bound * float(len(lengths))) for bound in bounds)
    return int(lengths[first:last].sum(dtype=np.int64))


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
