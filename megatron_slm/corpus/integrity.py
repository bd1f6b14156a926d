"""Looks at every byte of a corpus for what cannot be: where it is, by document and byte offset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_slm.corpus.index import CHUNK, Index, bin_path, byte_offsets, chunks, idx_path, mapped_tokens, read_index
from megatron_slm.corpus.metadata import find_metadata
from megatron_slm.runtime.console import progress

PLACES_SHOWN = 5  # of one kind of damage


@dataclass(frozen=True)
class Damage:
    """One kind of damage in one file."""

    what: str
    where: tuple[str, ...] = ()  # the first places
    count: int = 1  # of all places

    def lines(self) -> list[str]:
        more = [f"and {self.count - len(self.where):,} more places"] if self.count > len(self.where) > 0 else []
        return [self.what, *(f"  {place}" for place in (*self.where, *more))]


@dataclass(frozen=True)
class Integrity:
    """What was found in a corpus."""

    damage: list[Damage]
    vocab_size: int | None  # that ids were held against; None: ids were not looked at


def check_integrity(prefix: str, vocab_size: int | None = None) -> Integrity:
    """Everything that is wrong with a corpus; reads it whole, in pieces.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        vocab_size: ids must be below it; None takes that of the metadata, and checks no ids if there is none.
    """
    missing = [path for path in (bin_path(prefix), idx_path(prefix)) if not path.is_file()]
    if missing:
        return Integrity([Damage(f"{path} is missing") for path in missing], None)
    try:
        index = read_index(prefix)
    except (ValueError, OSError) as error:
        return Integrity([Damage(str(error))], None)  # nothing behind the header can be trusted
    found = check_index(index)
    if not found:
        found = [*_check_size(index)]
    vocab_size, of_metadata = _check_metadata(index, vocab_size)
    found += of_metadata
    if vocab_size is not None:
        found += _check_ids(index, vocab_size)
    return Integrity(found, vocab_size)


def check_index(index: Index) -> list[Damage]:
    """Return the damage of the boundaries, lengths and offsets of an index; reads all of it, in chunks."""
    found = [*_check_boundaries(index), *_check_lengths(index)]
    return found or list(_check_pointers(index))


def _check_lengths(index: Index) -> Iterator[Damage]:
    places, count = _places(index.lengths, lambda part: part < 0)
    where = [f"{_sequence(index, place)}: {index.lengths[place]} tokens" for place in places]
    if count:
        yield Damage(f"{idx_path(index.prefix)}: negative lengths", tuple(where), count)


def _check_boundaries(index: Index) -> Iterator[Damage]:
    path, bounds, sequences = idx_path(index.prefix), index.boundaries, index.sequences
    if bounds[0] != 0:
        yield Damage(f"{path}: the first document begins at sequence {bounds[0]}, not at 0")
    if bounds[-1] != sequences:
        yield Damage(f"{path}: the last document ends at sequence {bounds[-1]}, and there are {sequences}")
    places, count = _places(bounds, lambda part: (part < 0) | (part > sequences))
    where = tuple(f"document {place}: sequence {bounds[place]} of {sequences}" for place in places)
    if count:
        yield Damage(f"{path}: documents begin outside the corpus", where, count)
    places, count = _places(bounds, lambda part: np.diff(part) < 0, overlap=1)
    where = tuple(f"document {place}: begins at {bounds[place]}, ends at {bounds[place + 1]}" for place in places)
    if count:
        yield Damage(f"{path}: documents end before they begin", where, count)


def _check_pointers(index: Index) -> Iterator[Damage]:
    """Each sequence must begin where the one before it ends."""
    expected, count, start = 0, 0, 0
    where: list[str] = []
    for lengths, pointers in zip(chunks(index.lengths), chunks(index.pointers), strict=True):
        starts, expected = byte_offsets(lengths, expected, index.dtype)
        wrong = np.flatnonzero(starts != pointers)
        for place in wrong[: PLACES_SHOWN - len(where)].tolist():
            where.append(
                f"{_sequence(index, start + place)}: offset {pointers[place]}, and the lengths before it give "
                f"{starts[place]}"
            )
        count += len(wrong)
        start += len(lengths)
    if count:
        yield Damage(f"{idx_path(index.prefix)}: offsets are not the sums of the lengths", tuple(where), count)


def _check_size(index: Index) -> Iterator[Damage]:
    path, width = bin_path(index.prefix), index.dtype.itemsize
    size, wanted = path.stat().st_size, index.tokens() * width
    if size > wanted:
        yield Damage(f"{path}: {size - wanted:,} bytes too many, from byte {wanted:,} on")
    elif size < wanted:
        first = max(int(np.searchsorted(index.pointers, size, side="right")) - 1, 0)
        yield Damage(
            f"{path} is cut short: {size:,} bytes of {wanted:,}",
            (f"whole up to {_sequence(index, first)}, byte {int(index.pointers[first]):,}",),
        )


def _check_metadata(index: Index, vocab_size: int | None) -> tuple[int | None, list[Damage]]:
    """Return the vocabulary size to check against, if it is known, and counts that differ from the metadata."""
    found = find_metadata(index.prefix)
    if found is None:
        return vocab_size, []
    path, metadata = found
    damage = [
        Damage(f"{path}: the metadata has {metadata[name]:,} {name}, and the corpus holds {there:,}")
        for name, there in (("documents", index.documents), ("tokens", index.tokens()))
        if isinstance(metadata.get(name), int) and metadata[name] != there
    ]
    return vocab_size if vocab_size is not None else metadata["tokenizer"]["vocab_size"], damage


def _check_ids(index: Index, vocab_size: int) -> Iterator[Damage]:
    if index.dtype.kind == "f":
        yield Damage(f"{idx_path(index.prefix)}: the dtype {index.dtype} is not one of token ids")
        return
    ids, width = mapped_tokens(index), index.dtype.itemsize

    def outside(part: np.ndarray) -> np.ndarray:
        if int(part.max()) < vocab_size and int(part.min()) >= 0:
            return np.zeros(0, bool)  # the usual case, at the speed of the memory
        return (part < 0) | (part >= vocab_size)

    with progress("looking at ids", ids.nbytes, "B") as bar:
        places, count = _places(ids, outside, bar.advance)
    where = []
    for place in places:
        sequence = max(int(np.searchsorted(index.pointers, place * width, side="right")) - 1, 0)
        where.append(f"{_sequence(index, sequence)}, byte {place * width:,}: id {ids[place]}")
    if count:
        what = f"{bin_path(index.prefix)}: ids outside the vocabulary of {vocab_size:,}"
        yield Damage(what, tuple(where), count)


def _places(
    array: np.ndarray,
    is_wrong: Callable[[np.ndarray], np.ndarray],
    advance: Callable[[float], None] = lambda amount: None,
    overlap: int = 0,
) -> tuple[list[int], int]:
    """The first places where ``is_wrong`` holds, and how many there are; chunks share ``overlap`` entries."""
    places: list[int] = []
    count = 0
    for start in range(0, max(len(array) - overlap, 0), CHUNK):
        part = array[start : start + CHUNK + overlap]
        wrong = np.flatnonzero(is_wrong(part))
        places += [start + place for place in wrong[: PLACES_SHOWN - len(places)].tolist()]
        count += len(wrong)
        advance(part.nbytes)
    return places, count


def _sequence(index: Index, sequence: int) -> str:
    """Which document a sequence belongs to."""
    document = int(np.searchsorted(index.boundaries, sequence, side="right")) - 1
    return f"document {document}, sequence {sequence}"
