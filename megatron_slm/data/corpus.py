"""Checks of corpora before they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_slm.data.index import bin_path, idx_path, read_index
from megatron_slm.data.metadata import read_metadata
from megatron_slm.data.tokenizers.tokenizer import Tokenizer
from megatron_slm.runtime.errors import ConfigError

MAKE_AGAIN = "Make it again with tools/preprocess_data.py."
SAMPLED_TOKENS = 1 << 20  # looked at for ids outside the vocabulary


@dataclass(frozen=True)
class CorpusInfo:
    """What the header and the pointers of a corpus say."""

    prefix: str
    dtype: Any  # numpy dtype of the ids
    sequences: int
    documents: int
    tokens: int


def check_corpus(prefix: str, flag: str) -> CorpusInfo:
    """Make sure that a corpus is there, whole, and of the format.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        flag: the flag that named it, for the message.

    Raises:
        ConfigError: missing, empty, truncated or foreign files.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            hint = f" Give the prefix without {path.suffix}." if prefix.endswith((".bin", ".idx")) else ""
            raise ConfigError(f"{flag} {prefix}: {path} is missing.{hint or ' ' + MAKE_AGAIN}")
    try:
        info = corpus_info(prefix)
    except ValueError as error:
        raise ConfigError(f"{flag} {prefix}: {error} {MAKE_AGAIN}") from error
    if info.tokens == 0:
        raise ConfigError(f"{flag} {prefix}: the corpus holds no documents, or only empty ones. {MAKE_AGAIN}")
    return info


def corpus_info(prefix: str) -> CorpusInfo:
    """Header and size of a corpus, which may be empty.

    Raises:
        ValueError: its files do not fit together, or are no corpus.
    """
    index = read_index(prefix)
    tokens, width = index.tokens(), index.dtype.itemsize
    if index.boundaries[0] != 0 or index.boundaries[-1] != index.sequences:
        raise ValueError(
            f"{idx_path(prefix)} has {index.sequences} sequences, and its documents hold "
            f"{index.boundaries[0]} to {index.boundaries[-1]}."
        )
    size = bin_path(prefix).stat().st_size
    if size != tokens * width:
        raise ValueError(f"{bin_path(prefix)} has {size} bytes, and its index promises {tokens * width}.")
    return CorpusInfo(prefix, index.dtype, index.sequences, index.documents, tokens)


def check_tokenizer(prefix: str, tokenizer: Tokenizer, flag: str) -> None:
    """Refuse a corpus that was made with another tokenizer.

    Corpora without metadata (Megatron-LM writes none) are sampled for ids outside the vocabulary instead.

    Raises:
        ConfigError: another tokenizer, another size, or an id outside the vocabulary.
    """
    metadata = read_metadata(prefix)
    if metadata is not None:
        theirs = metadata["tokenizer"]
        for what, there, here in (
            ("vocabulary size", theirs["vocab_size"], tokenizer.vocab_size),
            ("fingerprint", theirs["fingerprint"], tokenizer.fingerprint),
        ):
            if there != here:
                raise ConfigError(
                    f"{flag} {prefix} was made with {theirs['name']} of {what} {there}, and this run has "
                    f"{tokenizer.name} of {what} {here} (--tokenizer-model). Use the tokenizer that made the corpus."
                )
        return
    ids = np.memmap(bin_path(prefix), read_index(prefix).dtype, "r")
    highest = int(ids[:SAMPLED_TOKENS].max(initial=0))
    if highest >= tokenizer.vocab_size:
        raise ConfigError(
            f"{flag} {prefix} holds the token id {highest}, and the vocabulary of {tokenizer.name} has "
            f"{tokenizer.vocab_size} entries (--tokenizer-model). Use the tokenizer that made the corpus."
        )
