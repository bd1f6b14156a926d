"""What a corpus holds: counts, lengths of its documents, and the documents themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_slm.corpus.checks import corpus_info
from megatron_slm.corpus.index import CHUNK, Index, mapped_tokens, read_index
from megatron_slm.runtime.errors import ConfigError


def open_corpus(prefix: str) -> Index:
    """The index of a corpus that is whole as far as its sizes tell; it may be empty.

    Raises:
        ConfigError: a file is missing, foreign or cut short.
    """
    try:
        corpus_info(prefix)
        return read_index(prefix)
    except FileNotFoundError as error:
        hint = " Give the prefix without it." if prefix.endswith((".bin", ".idx")) else ""
        raise ConfigError(f"{error.filename} is missing.{hint}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{error} --check tells more.") from error


@dataclass(frozen=True)
class Lengths:
    """How many documents have how many tokens. There are at most sqrt(2 x tokens) different lengths."""

    tokens: np.ndarray  # [n] int64, rising
    documents: np.ndarray  # [n] int64

    @classmethod
    def of(cls, index: Index) -> Lengths:
        """Count the documents of a corpus by length, in pieces."""
        tokens, documents = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for part in _document_lengths(index):
            more, counts = np.unique(part, return_counts=True)
            tokens, where = np.unique(np.concatenate([tokens, more]), return_inverse=True)
            documents = np.bincount(where, np.concatenate([documents, counts]), len(tokens)).astype(np.int64)
        return cls(tokens, documents)

    @property
    def total(self) -> int:
        return int(self.documents.sum())

    @property
    def mean(self) -> float:
        return float((self.tokens * self.documents).sum() / max(self.total, 1))

    def quantile(self, share: float) -> int:
        """The shortest length that at least ``share`` of the documents do not exceed; exact."""
        rank = max(int(np.ceil(share * self.total)), 1)
        return int(self.tokens[np.searchsorted(np.cumsum(self.documents), rank)])

    def doubling_bins(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, documents) of the lengths 0, 1, 2-3, 4-7, ... up to the longest."""
        if not self.total:
            return []
        bins = np.where(self.tokens > 0, np.frexp(self.tokens.astype(np.float64))[1], 0)
        counts = np.bincount(bins, self.documents).astype(np.int64).tolist()
        first = next(place for place, count in enumerate(counts) if count)
        return [(1 << place >> 1, (1 << place) - 1, counts[place]) for place in range(first, len(counts))]


def _document_lengths(index: Index) -> Iterator[np.ndarray]:
    """Tokens of each document, int64, in pieces. Reads pointers, not lengths: a document is a run of sequences."""
    end = index.tokens()
    for start in range(0, index.documents, CHUNK):
        bounds = index.boundaries[start : start + CHUNK + 1]
        inside = bounds < index.sequences
        offsets = np.full(len(bounds), end, np.int64)
        offsets[inside] = index.pointers[bounds[inside]] // index.dtype.itemsize
        yield np.diff(offsets)


def document_ids(index: Index, number: int) -> np.ndarray:
    """The token ids of a document.

    Args:
        number: counted from 0; a negative one counts from the end.

    Raises:
        ConfigError: there is no such document, or ``.bin`` ends before it.
    """
    count = index.documents
    if not -count <= number < count:
        raise ConfigError(f"--documents {number}: {index.prefix} has {count:,} documents, numbered from 0.")
    first, last = (int(bound) for bound in index.boundaries[number % count : number % count + 2])
    if first == last:
        return np.zeros(0, index.dtype)
    begin = int(index.pointers[first]) // index.dtype.itemsize
    length = int(index.lengths[first:last].sum(dtype=np.int64))
    ids = mapped_tokens(index)[begin : begin + length]
    if len(ids) < length:
        raise ConfigError(f"--documents {number}: {index.prefix}.bin ends before this document does (--check).")
    return np.asarray(ids)
