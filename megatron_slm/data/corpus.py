"""Checking corpora before they are read, and the record of the tokenizer beside them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.index import bin_path, idx_path, read_index
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


def record_path(prefix: str | Path) -> Path:
    """The JSON file beside a corpus that tells which tokenizer made it."""
    return Path(f"{prefix}.json")


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


def write_record(prefix: str | Path, tokenizer: Tokenizer, info: dict[str, Any]) -> None:
    """Write the tokenizer's name, fingerprint and size beside a corpus, and ``info`` with them."""
    record = {
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        **info,
    }
    replace_record(prefix, record)


def replace_record(prefix: str | Path, record: dict[str, Any]) -> None:
    """Write a whole record under a temporary name, and then its own."""
    partial = Path(f"{record_path(prefix)}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, record_path(prefix))  # noqa: PTH105


def read_record(prefix: str | Path) -> dict[str, Any] | None:
    """The record beside a corpus; None where there is none (Megatron-LM writes none).

    Raises:
        ConfigError: the file is not such a record.
    """
    path = record_path(prefix)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"name", "fingerprint", "vocab_size"} <= record["tokenizer"].keys():
            raise ValueError("it names no tokenizer")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not the record of a corpus: {error}. Make the corpus again, or remove the file: the corpus is "
            "then sampled for ids outside the vocabulary instead."
        ) from error
    found: dict[str, Any] = record
    return found


def check_tokenizer(prefix: str, tokenizer: Tokenizer, flag: str) -> None:
    """Refuse a corpus that was made with another tokenizer.

    Corpora without a record (Megatron-LM writes none) are sampled for ids outside the vocabulary instead.

    Raises:
        ConfigError: another tokenizer, another size, or an id outside the vocabulary.
    """
    record = read_record(prefix)
    if record is not None:
        theirs = record["tokenizer"]
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
