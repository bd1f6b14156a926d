"""Validation of corpora before a run reads them."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.corpus.document_ends import check_document_ends
from megatron_slm.corpus.fingerprints import BLOCK, block_starts
from megatron_slm.corpus.index import Index, bin_path, chunks, idx_path, read_index
from megatron_slm.corpus.integrity import check_index, count_differences
from megatron_slm.corpus.metadata import find_metadata, read_metadata
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.identity import identity_conflict
from megatron_slm.tokenizers.tokenizer import Tokenizer

MAKE_AGAIN = "Recreate it with tools/preprocess_data.py, or tools/preprocess_sft.py if it holds examples."


@dataclass(frozen=True)
class CorpusInfo:
    """Hold the dtype and the counts of a corpus."""

    prefix: str
    dtype: Any  # numpy dtype of the token ids
    sequences: int
    documents: int
    tokens: int


def check_corpus(prefix: str, flag: str) -> CorpusInfo:
    """Validate the index of a corpus and the size of its ``.bin``, and return its counts.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        flag: flag that named the corpus, for error messages.

    Raises:
        ConfigError: a file is missing, unreadable, empty, truncated, inconsistent or of another format.
    """
    check_files_exist(prefix, f"{flag} {prefix}", MAKE_AGAIN)
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
        raise ConfigError(f"{flag} {prefix}: the corpus contains no tokens. {MAKE_AGAIN}")
    return info


def check_files_exist(prefix: str, subject: str, remedy: str) -> None:
    """Raise ConfigError, starting with ``subject`` and ending with ``remedy``, if ``.bin`` or ``.idx`` is missing."""
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise ConfigError(f"{subject}: {path} is missing. {_correction(prefix) or remedy}")


def _correction(prefix: str) -> str:
    """Return the likely correction of a prefix without corpus files, or an empty string."""
    if prefix.endswith((".bin", ".idx")):
        return f"Omit {prefix[-4:]} from the prefix."
    path = Path(prefix)
    longer = [str(index)[:-4] for index in sorted(path.parent.glob(f"{glob.escape(path.name)}_*.idx"))]
    if idx_path(prefix).exists() or not longer:
        return ""
    return f"Did you mean {' or '.join(longer[:3])}?"


def corpus_info(prefix: str) -> CorpusInfo:
    """Return the counts of a corpus, which may be empty, after comparing the file sizes with the header.

    Raises:
        ValueError: the files are inconsistent or of another format.
        OSError: a file cannot be read.
    """
    index = read_index(prefix)
    tokens, width = index.tokens(), index.dtype.itemsize
    if index.boundaries[0] != 0 or index.boundaries[-1] != index.sequences:
        raise ValueError(
            f"{idx_path(prefix)} has {index.sequences} sequences, but its documents span sequences "
            f"{index.boundaries[0]} to {index.boundaries[-1]}."
        )
    size = bin_path(prefix).stat().st_size
    if size != tokens * width:
        raise ValueError(f"{bin_path(prefix)} has {size} bytes, but its index requires {tokens * width}.")
    return CorpusInfo(prefix, index.dtype, index.sequences, index.documents, tokens)


def check_tokenizer(prefix: str, tokenizer: Tokenizer, flag: str) -> None:
    """Validate a corpus against the tokenizer: its metadata (if present), document ends and token ids.

    At most 64 blocks of 1 MiB are read from ``.bin``; the ids of each sample are validated when the sample is read.

    Raises:
        ConfigError: the corpus was made with another tokenizer, its metadata has other counts, or a sampled id is
            outside the vocabulary.
    """
    index = read_index(prefix)
    _check_metadata(index, tokenizer, flag)
    if index.dtype.kind == "f":
        raise ConfigError(f"{flag} {prefix}: {index.dtype} is not an integer dtype. {MAKE_AGAIN}")
    for block in _sampled_ids(index):
        lowest, highest = int(block.min(initial=0)), int(block.max(initial=0))
        if lowest < 0 or highest >= tokenizer.vocab_size:
            raise ConfigError(
                f"{flag} {prefix} contains the token id {lowest if lowest < 0 else highest}, but the vocabulary of "
                f"{tokenizer.name} has {tokenizer.vocab_size} entries (--tokenizer-model). Use the tokenizer that made "
                "the corpus."
            )
    metadata = read_metadata(prefix)
    if metadata is None or "eod" not in metadata["tokenizer"]:
        check_document_ends(index, tokenizer, flag)


def has_several_sequences(prefix: str) -> bool:
    """Return whether any document has more than one sequence (made with --split-sentences)."""
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
            f"{flag} {index.prefix} was made with {theirs}, but this run uses {ours} (--tokenizer-model). {remedy}."
        )
    if differences := count_differences(index, metadata):
        raise ConfigError(
            f"{flag} {index.prefix}: {path} records {differences[0]}: another corpus was written under this name. "
            f"Remove {path} if the corpus is the right one."
        )


def _sampled_ids(index: Index) -> list[np.ndarray]:
    """Return memory-mapped blocks of the token ids."""
    width = index.dtype.itemsize
    size = bin_path(index.prefix).stat().st_size
    ids = np.memmap(bin_path(index.prefix), index.dtype, "r")
    return [ids[start // width : (start + BLOCK) // width] for start in block_starts(size, BLOCK)]
