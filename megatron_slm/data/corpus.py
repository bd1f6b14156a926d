"""The ``.bin/.idx`` format: checking corpora before they are read, and the record of the tokenizer beside them.

``.bin`` holds token ids back to back. ``.idx`` holds a header (magic, version, dtype code, counts) and then the length
of each sequence (int32), its byte offset in ``.bin`` (int64), and the sequence at which each document begins (int64),
as Megatron-Core's IndexedDataset writes them.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.runtime.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
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


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


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
        return _read_index(prefix)
    except ValueError as error:
        raise ConfigError(f"{flag} {prefix}: {error} {MAKE_AGAIN}") from error


def _read_index(prefix: str) -> CorpusInfo:
    path = idx_path(prefix)
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path} is cut short: {len(header)} bytes, less than a header.")
    magic, version, code, sequences, boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise ValueError(f"{path} is not an index of Megatron's (magic {magic!r}, version {version}, dtype {code}).")
    wanted = HEADER.size + sequences * 12 + boundaries * 8
    if path.stat().st_size != wanted:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, and its header promises {wanted}.")
    if sequences == 0:
        raise ValueError(f"{path} holds no documents.")
    lengths = np.memmap(path, np.int32, "r", HEADER.size, (sequences,))
    width = np.dtype(DTYPES[code]).itemsize
    tokens = int(lengths.sum(dtype=np.int64))
    size = bin_path(prefix).stat().st_size
    if size != tokens * width:
        raise ValueError(f"{bin_path(prefix)} has {size} bytes, and its index promises {tokens * width}.")
    return CorpusInfo(prefix, np.dtype(DTYPES[code]), sequences, boundaries - 1, tokens)


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
    partial = Path(f"{record_path(prefix)}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, record_path(prefix))  # noqa: PTH105


def check_tokenizer(prefix: str, tokenizer: Tokenizer, flag: str) -> None:
    """Refuse a corpus that was made with another tokenizer.

    Corpora without a record (Megatron-LM writes none) are sampled for ids outside the vocabulary instead.

    Raises:
        ConfigError: another tokenizer, another size, or an id outside the vocabulary.
    """
    path = record_path(prefix)
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))["tokenizer"]
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
    info = _read_index(prefix)
    ids = np.memmap(bin_path(prefix), info.dtype, "r")
    highest = int(ids[:SAMPLED_TOKENS].max(initial=0))
    if highest >= tokenizer.vocab_size:
        raise ConfigError(
            f"{flag} {prefix} holds the token id {highest}, and the vocabulary of {tokenizer.name} has "
            f"{tokenizer.vocab_size} entries (--tokenizer-model). Use the tokenizer that made the corpus."
        )
