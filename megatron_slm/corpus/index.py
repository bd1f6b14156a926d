"""Megatron-Core's ``.bin/.idx`` format: file names, header, and memory-mapped index arrays.

``.bin`` contains the concatenated token ids. ``.idx`` contains a header (magic, version, dtype code, counts), the
length of each sequence (int32), its byte offset in ``.bin`` (int64), and the first sequence of each document (int64)
followed by the sequence count.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_regular

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
CHUNK = 1 << 22  # array entries processed per step; bounds the memory of every reader of an index


@dataclass(frozen=True)
class Index:
    """Hold the memory-mapped, unvalidated arrays of an ``.idx``; corpus/integrity.py validates them."""

    prefix: str
    dtype: Any  # numpy dtype of the token ids
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
        """Return the token count: the sum of all lengths."""
        return sum(int(part.sum(dtype=np.int64)) for part in chunks(self.lengths))


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def partial_prefix(prefix: str | Path) -> str:
    """Return the temporary prefix of a corpus that is being written."""
    return f"{prefix}.partial"


def is_index(path: Path) -> bool:
    """Return whether a file has the magic of an index or is empty (left by a full disk)."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError:
        return False
    return magic in (b"", MAGIC)


def chunks(array: np.ndarray, size: int = CHUNK) -> Iterator[np.ndarray]:
    """Yield consecutive slices of ``array`` with at most ``size`` entries."""
    for start in range(0, len(array), size):
        yield array[start : start + size]


def byte_offsets(lengths: np.ndarray, first: int, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """Compute the byte offsets of consecutive sequences in ``.bin``.

    Args:
        lengths: tokens of each sequence, [sequences] with at least one.
        first: byte offset of the first sequence.
        dtype: dtype of the token ids.

    Returns:
        the offset of each sequence, [sequences] int64, and the end offset of the last.
    """
    sizes = lengths.astype(np.int64) * dtype.itemsize
    ends = first + np.cumsum(sizes)
    return ends - sizes, int(ends[-1])


def read_index(prefix: str) -> Index:
    """Memory-map the index of a corpus.

    Raises:
        ValueError: the file is truncated or of another format, or its size does not match its header.
        OSError: the file cannot be read.
    """
    path = idx_path(prefix)
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path} is truncated: {len(header)} bytes, less than a header.")
    magic, version, code, sequences, boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION or code not in DTYPES:
        raise ValueError(f"{path} is not a Megatron-Core index (magic {magic!r}, version {version}, dtype {code}).")
    wanted, size = HEADER.size + sequences * 12 + boundaries * 8, path.stat().st_size
    if size == wanted + sequences and sequences:
        raise ValueError(f"{path} belongs to a multimodal corpus (it contains sequence modes), which is not supported.")
    if size != wanted:
        raise ValueError(f"{path} has {size} bytes, but its header requires {wanted}.")
    if boundaries == 0:
        raise ValueError(f"{path} has no document boundaries; an index without documents has one.")
    offset = HEADER.size
    lengths = _mapped(path, np.int32, offset, sequences)
    pointers = _mapped(path, np.int64, offset + 4 * sequences, sequences)
    return Index(
        prefix, np.dtype(DTYPES[code]), lengths, pointers, _mapped(path, np.int64, offset + 12 * sequences, boundaries)
    )


def _mapped(path: Path, dtype: Any, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)


def joined_documents(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Return the token counts, int32, and byte offsets, int64, of all non-empty documents.

    Raises:
        ConfigError: a document exceeds the maximum sequence length of the format.
    """
    first_sequences = index.boundaries[:-1][np.diff(index.boundaries) > 0]
    pointers = np.array(index.pointers[first_sequences])
    lengths = np.diff(pointers, append=index.tokens() * index.dtype.itemsize) // index.dtype.itemsize
    if int(lengths.max(initial=0)) > np.iinfo(np.int32).max:
        raise ConfigError(
            f"--slm-sentences join: {idx_path(index.prefix)} has a document of {int(lengths.max()):,} tokens, but the "
            "maximum sequence length is 2^31 - 1. Split the document, or use --slm-sentences separate."
        )
    return lengths.astype(np.int32), pointers


def mapped_tokens(index: Index) -> np.ndarray:
    """Return the memory-mapped token ids of a possibly truncated ``.bin``, [tokens] of ``index.dtype``."""
    path = bin_path(index.prefix)
    return _mapped(path, index.dtype, 0, path.stat().st_size // index.dtype.itemsize)


def packed_header(dtype: Any, sequences: int, documents: int) -> bytes:
    """Return the packed header of an index."""
    code = next(code for code, kind in DTYPES.items() if np.dtype(kind) == dtype)
    return HEADER.pack(MAGIC, VERSION, code, sequences, documents + 1)
