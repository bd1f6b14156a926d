"""Checks of corpora before they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_slm.corpus.document_ends import check_document_ends
from megatron_slm.corpus.fingerprints import BLOCK, block_starts
from megatron_slm.corpus.index import Index, bin_path, chunks, idx_path, read_index
from megatron_slm.corpus.integrity import check_index
from megatron_slm.corpus.metadata import find_metadata, read_metadata
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.identity import identity_conflict
from megatron_slm.tokenizers.tokenizer import Tokenizer

MAKE_AGAIN = "Make it again with tools/preprocess_data.py."


@dataclass(frozen=True)
class CorpusInfo:
    """The counts of a corpus."""

    prefix: str
    dtype: Any  # numpy dtype of the ids
    sequences: int
    documents: int
    tokens: int


def check_corpus(prefix: str, flag: str) -> CorpusInfo:
    """Validate the index of a corpus, and the size of its ``.bin``.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        flag: the flag that named it, for the message.

    Raises:
        ConfigError: missing, unreadable, empty, truncated, inconsistent or foreign files.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            hint = f" Give the prefix without {path.suffix}." if prefix.endswith((".bin", ".idx")) else ""
            raise ConfigError(f"{flag} {prefix}: {path} is missing.{hint or ' ' + MAKE_AGAIN}")
    try:
        info = corpus_info(prefix)
        damage = check_index(read_index(prefix))
    except ValueError as error:
        raise ConfigError(f"{flag} {prefix}: {error} {MAKE_AGAIN}") from error
    except OSError as error:
        raise ConfigError(
            f"{flag} {prefix}: {error.filename or idx_path(prefix)} cannot be read: {error.strerror}."
        ) from error
    if damage:
        raise ConfigError(f"{flag} {prefix}: {'; '.join(damage[0].lines())}. {MAKE_AGAIN}")
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
    """Compare a corpus with the tokenizer: its metadata, if there are any, the ends of its documents, and its ids.

    Of a ``.bin`` above 64 MiB, 64 blocks of 1 MiB are read; the ids of every sample are checked when it is read.

    Raises:
        ConfigError: another tokenizer, another size, counts that are not those of the corpus, or an id outside the
            vocabulary.
    """
    index = read_index(prefix)
    _check_metadata(index, tokenizer, flag)
    if index.dtype.kind == "f":
        raise ConfigError(f"{flag} {prefix}: the dtype {index.dtype} is not one of token ids. {MAKE_AGAIN}")
    for block in _sampled_ids(index):
        lowest, highest = int(block.min(initial=0)), int(block.max(initial=0))
        if lowest < 0 or highest >= tokenizer.vocab_size:
            raise ConfigError(
                f"{flag} {prefix} holds the token id {lowest if lowest < 0 else highest}, and the vocabulary of "
                f"{tokenizer.name} has {tokenizer.vocab_size} entries (--tokenizer-model). Use the tokenizer that made "
                "the corpus."
            )
    metadata = read_metadata(prefix)
    if metadata is None or "eod" not in metadata["tokenizer"]:
        check_document_ends(index, tokenizer, flag)


def has_several_sequences(prefix: str) -> bool:
    """Return whether a document of the corpus has more than one sequence, as --split-sentences makes them."""
    bounds = read_index(prefix).boundaries
    last = 0
    for part in chunks(bounds):
        if int(np.diff(part, prepend=last).max(initial=0)) > 1:
            return True
        last = int(part[-1])
    return False


def _check_metadata(index: Index, tokenizer: Tokenizer, flag: str) -> None:
    found = find_metadata(index.prefix)
    if found is None:
        return
    path, metadata = found
    if (conflict := identity_conflict(metadata["tokenizer"], tokenizer)) is not None:
        theirs, ours, remedy = conflict
        raise ConfigError(
            f"{flag} {index.prefix} was made with {theirs}, and this run has {ours} (--tokenizer-model). {remedy}."
        )
    for what, count in (("documents", index.documents), ("tokens", index.tokens())):
        if isinstance(metadata.get(what), int) and metadata[what] != count:
            raise ConfigError(
                f"{flag} {index.prefix}: the metadata {path} have {metadata[what]:,} {what}, and the corpus has "
                f"{count:,}: another corpus was written under this name. Remove {path} if the corpus is the right one."
            )


def _sampled_ids(index: Index) -> list[np.ndarray]:
    """Return blocks of the token ids, mapped."""
    width = index.dtype.itemsize
    size = bin_path(index.prefix).stat().st_size
    ids = np.memmap(bin_path(index.prefix), index.dtype, "r")
    return [ids[start // width : (start + BLOCK) // width] for start in block_starts(size, BLOCK)]
