"""The ``.bin/.idx`` format: names, header and arrays of an index, mapped and never read whole.

``.bin`` holds token ids back to back. ``.idx`` holds a header (magic, version, dtype code, counts) and then the length
of each sequence (int32), its byte offset in ``.bin`` (int64), and the sequence at which each document begins (int64),
with the number of sequences behind the last one, as Megatron-Core's IndexedDataset writes them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.runtime.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
VERSION = 1
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
CHUNK = 1 << 22  # entries of an array that are looked at together: what bounds the memory of all that reads an index


@dataclass(frozen=True)
class Index:
    """An ``.idx``, mapped. The arrays are as they stand in the file, which may be wrong: see data/integrity.py."""

    prefix: str
    dtype: Any  # numpy dtype of the ids
    lengths: np.ndarray  # [sequences] int32, tokens
    pointers: np.ndarray  # [sequences] int64, bytes
    boundaries: np.ndarray  # [documents + 1] int64, sequences

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def documents(self) -> int:
        return len(self.boundaries) - 1

    def tokens(self) -> int:
        """The sum of all lengths; reads them."""
        return sum(int(part.sum(dtype=np.int64)) for part in chunks(self.lengths))


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def partial_prefix(prefix: str | Path) -> str:
    """The prefix of a corpus that is being written."""
    return f"{prefix}.partial"


def is_index(path: Path) -> bool:
    """Return whether a file begins as an index, or is empty, as a full disk leaves one."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(MAGIC))
    except OSError:
        return False
    return begin in (b"", MAGIC)


def chunks(array: np.ndarray, size: int = CHUNK) -> Iterator[np.ndarray]:
    """``array`` in pieces of at most ``size`` entries."""
    for start in range(0, len(array), size):
        yield array[start : start + size]


def byte_offsets(lengths: np.ndarray, begin: int, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """Where sequences of ``lengths`` tokens, at least one, begin when the first is at byte ``begin``; and their end.

    Returns:
        [sequences] int64, and a byte.
    """
    sizes = lengths.astype(np.int64) * dtype.itemsize
    ends = begin + np.cumsum(sizes)
    return ends - sizes, int(ends[-1])


def read_index(prefix: str) -> Index:
    """Map the index of a corpus.

    Raises:
        ValueError: the file is cut short, foreign, or of another length than its header promises.
        OSError: the file cannot be read.
    """
    path = idx_path(prefix)
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path} is cut short: {len(header)} bytes, less than a header.")
    magic, version, code, sequences, boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION or code not in DTYPES:
        raise ValueError(f"{path} is not an index of Megatron's (magic {magic!r}, version {version}, dtype {code}).")
    wanted, size = HEADER.size + sequences * 12 + boundaries * 8, path.stat().st_size
    if size == wanted + sequences and sequences:
        raise ValueError(
            f"{path} is of a multimodal corpus (it holds a mode for each sequence), which is not read here."
        )
    if size != wanted:
        raise ValueError(f"{path} has {size} bytes, and its header promises {wanted}.")
    if boundaries == 0:
        raise ValueError(f"{path} has no document boundaries; an index without documents has one.")
    at = HEADER.size
    lengths = _mapped(path, np.int32, at, sequences)
    pointers = _mapped(path, np.int64, at + 4 * sequences, sequences)
    return Index(
        prefix, np.dtype(DTYPES[code]), lengths, pointers, _mapped(path, np.int64, at + 12 * sequences, boundaries)
    )


def _mapped(path: Path, dtype: Any, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)


def joined_documents(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens, int32, and the first byte, int64, of each document of an index that has any.

    Raises:
        ConfigError: a document has more tokens than the format allows for a sequence.
    """
    begins = index.boundaries[:-1][np.diff(index.boundaries) > 0]
    pointers = np.array(index.pointers[begins])
    lengths = np.diff(pointers, append=index.tokens() * index.dtype.itemsize) // index.dtype.itemsize
    if int(lengths.max(initial=0)) > np.iinfo(np.int32).max:
        raise ConfigError(
            f"--slm-sentences join: {idx_path(index.prefix)} has a document of {int(lengths.max()):,} tokens, and a "
            "sequence has at most 2^31 - 1. Split the document, or use --slm-sentences separate."
        )
    return lengths.astype(np.int32), pointers


def mapped_tokens(index: Index) -> np.ndarray:
    """The ids of ``.bin`` as far as they are there, [tokens] of ``index.dtype``."""
    path = bin_path(index.prefix)
    return _mapped(path, index.dtype, 0, path.stat().st_size // index.dtype.itemsize)


def packed_header(dtype: Any, sequences: int, documents: int) -> bytes:
    """The first bytes of an index."""
    code = next(code for code, kind in DTYPES.items() if np.dtype(kind) == dtype)
    return HEADER.pack(MAGIC, VERSION, code, sequences, documents + 1)
