"""Corpus statistics: document-length distribution, and access to single documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_slm.corpus.checks import check_files_exist, corpus_info
from megatron_slm.corpus.index import CHUNK, Index, mapped_tokens, read_index
from megatron_slm.runtime.errors import ConfigError


def open_corpus(prefix: str) -> Index:
    """Return the index of a corpus, which may be empty, after comparing the file sizes with the header.

    Raises:
        ConfigError: a file is missing, truncated or of another format.
    """
    check_files_exist(prefix, prefix, "Check the path.")
    try:
        corpus_info(prefix)
        return read_index(prefix)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{error} Run --check for details.") from error


@dataclass(frozen=True)
class Lengths:
    """Represent the distribution of document lengths, which has at most sqrt(2 x tokens) distinct values."""

    tokens: np.ndarray  # [n] int64, ascending
    documents: np.ndarray  # [n] int64

    @classmethod
    def from_index(cls, index: Index) -> Lengths:
        """Count the documents of a corpus by length, in constant memory."""
        tokens, documents = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for part in _document_lengths(index):
            more, counts = np.unique(part, return_counts=True)
            tokens, inverse = np.unique(np.concatenate([tokens, more]), return_inverse=True)
            documents = np.bincount(inverse, np.concatenate([documents, counts]), len(tokens)).astype(np.int64)
        return cls(tokens, documents)

    @property
    def total(self) -> int:
        return int(self.documents.sum())

    @property
    def mean(self) -> float:
        return float((self.tokens * self.documents).sum() / max(self.total, 1))

    def quantile(self, share: float) -> int:
        """Return the smallest length that is not exceeded by at least ``share`` of the documents."""
        rank = max(int(np.ceil(share * self.total)), 1)
        return int(self.tokens[np.searchsorted(np.cumsum(self.documents), rank)])

    def doubling_bins(self) -> list[tuple[int, int, int]]:
        """Return (shortest, longest, documents) of the bins 0, 1, 2-3, 4-7, ... up to the maximum length."""
        if not self.total:
            return []
        bins = np.where(self.tokens > 0, np.frexp(self.tokens.astype(np.float64))[1], 0)
        counts = np.bincount(bins, self.documents).astype(np.int64).tolist()
        first = next(place for place, count in enumerate(counts) if count)
        return [(1 << place >> 1, (1 << place) - 1, counts[place]) for place in range(first, len(counts))]


def _document_lengths(index: Index) -> Iterator[np.ndarray]:
    """Yield the token counts of consecutive documents, int64, computed from the pointers of their first sequences."""
    end = index.tokens()
    for start in range(0, index.documents, CHUNK):
        bounds = index.boundaries[start : start + CHUNK + 1]
        inside = bounds < index.sequences
        offsets = np.full(len(bounds), end, np.int64)
        offsets[inside] = index.pointers[bounds[inside]] // index.dtype.itemsize
        yield np.diff(offsets)


def document_ids(index: Index, number: int) -> np.ndarray:
    """Return the token ids of a document.

    Args:
        number: document number from 0; negative numbers count from the end.

    Raises:
        ConfigError: the document does not exist, or ``.bin`` is truncated before its end.
    """
    count = index.documents
    if not -count <= number < count:
        raise ConfigError(f"--documents {number}: {index.prefix} has {count:,} documents, numbered from 0.")
    first, last = (int(bound) for bound in index.boundaries[number % count : number % count + 2])
    if first == last:
        return np.zeros(0, index.dtype)
    start = int(index.pointers[first]) // index.dtype.itemsize
    length = int(index.lengths[first:last].sum(dtype=np.int64))
    ids = mapped_tokens(index)[start : start + length]
    if len(ids) < length:
        raise ConfigError(f"--documents {number}: {index.prefix}.bin ends before this document does (--check).")
    return np.asarray(ids)
