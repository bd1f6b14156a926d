"""Validate a corpus and report corruption by document and byte offset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_slm.corpus.index import CHUNK, Index, bin_path, byte_offsets, chunks, idx_path, mapped_tokens, read_index
from megatron_slm.corpus.metadata import find_metadata
from megatron_slm.runtime.console import progress

PLACES_SHOWN = 5  # reported locations per kind of damage


@dataclass(frozen=True)
class Damage:
    """Represent one kind of damage in one file."""

    description: str
    places: tuple[str, ...] = ()  # the first locations
    count: int = 1  # number of locations

    def lines(self) -> list[str]:
        """Return the report: the description, and one indented line per location."""
        more = [f"and {self.count - len(self.places):,} more places"] if self.count > len(self.places) > 0 else []
        return [self.description, *(f"  {place}" for place in (*self.places, *more))]


@dataclass(frozen=True)
class Integrity:
    """Hold the result of validating a corpus."""

    damage: list[Damage]
    vocab_size: int | None  # vocabulary size that ids were compared with; None if ids were not validated


def check_integrity(prefix: str, vocab_size: int | None = None) -> Integrity:
    """Validate all of a corpus, in constant memory.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        vocab_size: exclusive upper bound of the ids; None uses the recorded one, and skips the ids without metadata.
    """
    missing = [path for path in (bin_path(prefix), idx_path(prefix)) if not path.is_file()]
    if missing:
        return Integrity([Damage(f"{path} is missing") for path in missing], None)
    try:
        index = read_index(prefix)
    except (ValueError, OSError) as error:
        return Integrity([Damage(str(error))], None)  # nothing after the header can be trusted
    found = check_index(index) or list(_check_size(index))
    if (recorded := find_metadata(index.prefix)) is not None:
        path, metadata = recorded
        found += [Damage(f"{path}: records {difference}") for difference in count_differences(index, metadata)]
        vocab_size = metadata["tokenizer"]["vocab_size"] if vocab_size is None else vocab_size
    if vocab_size is not None:
        found += _check_ids(index, vocab_size)
    return Integrity(found, vocab_size)


def check_index(index: Index) -> list[Damage]:
    """Validate the boundaries, lengths and offsets of an index, in constant memory."""
    found = [*_check_boundaries(index), *_check_lengths(index)]
    return found or list(_check_pointers(index))


def count_differences(index: Index, metadata: dict[str, Any]) -> list[str]:
    """Return descriptions of the recorded counts that differ from those of the index."""
    return [
        f"{metadata[name]:,} {name}, but the corpus contains {count:,}"
        for name, count in (("documents", index.documents), ("tokens", index.tokens()))
        if isinstance(metadata.get(name), int) and metadata[name] != count
    ]


def _check_lengths(index: Index) -> Iterator[Damage]:
    places, count = _places(index.lengths, lambda part: part < 0)
    shown = tuple(f"{_describe_sequence(index, place)}: {index.lengths[place]} tokens" for place in places)
    if count:
        yield Damage(f"{idx_path(index.prefix)}: negative lengths", shown, count)


def _check_boundaries(index: Index) -> Iterator[Damage]:
    path, bounds, sequences = idx_path(index.prefix), index.boundaries, index.sequences
    if bounds[0] != 0:
        yield Damage(f"{path}: the first document starts at sequence {bounds[0]} instead of 0")
    if bounds[-1] != sequences:
        yield Damage(f"{path}: the last document ends at sequence {bounds[-1]} of {sequences}")
    places, count = _places(bounds, lambda part: (part < 0) | (part > sequences))
    shown = tuple(f"document {place}: sequence {bounds[place]} of {sequences}" for place in places)
    if count:
        yield Damage(f"{path}: documents start outside the corpus", shown, count)
    places, count = _places(bounds, lambda part: np.diff(part) < 0, overlap=1)
    shown = tuple(f"document {place}: starts at {bounds[place]}, ends at {bounds[place + 1]}" for place in places)
    if count:
        yield Damage(f"{path}: documents end before they start", shown, count)


def _check_pointers(index: Index) -> Iterator[Damage]:
    """Validate that each sequence starts at the end of the previous one."""
    expected, count, start = 0, 0, 0
    shown: list[str] = []
    for lengths, pointers in zip(chunks(index.lengths), chunks(index.pointers), strict=True):
        starts, expected = byte_offsets(lengths, expected, index.dtype)
        wrong = np.flatnonzero(starts != pointers)
        for place in wrong[: PLACES_SHOWN - len(shown)].tolist():
            shown.append(
                f"{_describe_sequence(index, start + place)}: offset {pointers[place]}, but the preceding lengths sum "
                f"to {starts[place]}"
            )
        count += len(wrong)
        start += len(lengths)
    if count:
        yield Damage(f"{idx_path(index.prefix)}: offsets are not the sums of the lengths", tuple(shown), count)


def _check_size(index: Index) -> Iterator[Damage]:
    path, width = bin_path(index.prefix), index.dtype.itemsize
    size, wanted = path.stat().st_size, index.tokens() * width
    if size > wanted:
        yield Damage(f"{path}: {size - wanted:,} excess bytes from byte {wanted:,} on")
    elif size < wanted:
        first = max(int(np.searchsorted(index.pointers, size, side="right")) - 1, 0)
        yield Damage(
            f"{path} is truncated: {size:,} bytes of {wanted:,}",
            (f"complete up to {_describe_sequence(index, first)}, byte {int(index.pointers[first]):,}",),
        )


def _check_ids(index: Index, vocab_size: int) -> Iterator[Damage]:
    if index.dtype.kind == "f":
        yield Damage(f"{idx_path(index.prefix)}: {index.dtype} is not an integer dtype")
        return
    ids, width = mapped_tokens(index), index.dtype.itemsize

    def outside(part: np.ndarray) -> np.ndarray:
        if int(part.max()) < vocab_size and int(part.min()) >= 0:
            return np.zeros(0, bool)  # fast path of intact corpora, at memory bandwidth
        return (part < 0) | (part >= vocab_size)

    with progress("checking ids", ids.nbytes, "B") as bar:
        places, count = _places(ids, outside, bar.advance)
    shown = []
    for place in places:
        sequence = max(int(np.searchsorted(index.pointers, place * width, side="right")) - 1, 0)
        shown.append(f"{_describe_sequence(index, sequence)}, byte {place * width:,}: id {ids[place]}")
    if count:
        description = f"{bin_path(index.prefix)}: ids outside the vocabulary of {vocab_size:,}"
        yield Damage(description, tuple(shown), count)


def _places(
    array: np.ndarray,
    is_wrong: Callable[[np.ndarray], np.ndarray],
    advance: Callable[[float], None] = lambda amount: None,
    overlap: int = 0,
) -> tuple[list[int], int]:
    """Return the first indices for which ``is_wrong`` holds, and their total; chunks share ``overlap`` entries."""
    places: list[int] = []
    count = 0
    for start in range(0, max(len(array) - overlap, 0), CHUNK):
        part = array[start : start + CHUNK + overlap]
        wrong = np.flatnonzero(is_wrong(part))
        places += [start + place for place in wrong[: PLACES_SHOWN - len(places)].tolist()]
        count += len(wrong)
        advance(part.nbytes)
    return places, count


def _describe_sequence(index: Index, sequence: int) -> str:
    """Return the document and sequence numbers of a sequence, for messages."""
    document = int(np.searchsorted(index.boundaries, sequence, side="right")) - 1
    return f"document {document}, sequence {sequence}"
