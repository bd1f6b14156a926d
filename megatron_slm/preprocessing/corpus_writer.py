"""Writes one ``.bin/.idx`` corpus block by block, in constant memory, so that it can be cut back to an earlier block.

Beside ``.bin``, the length of each sequence and the number of sequences of each document grow in files of their own
(4 bytes each). At the end ``.idx`` is composed of them, and only then the corpus gets its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from megatron_slm.corpus.index import bin_path, byte_offsets, idx_path, is_index, packed_header, partial_prefix
from megatron_slm.corpus.metadata import check_metadata_writable
from megatron_slm.runtime.files import check_replaceable, publish, sync

AT_ONCE = 1 << 20  # numbers that are held in memory while the index is composed
SMALL_VOCABULARY = 65500  # below it ids are stored as uint16
Sizes = tuple[int, ...]  # bytes of .bin, of the lengths' file and of the sequences' file


def corpus_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron-Core stores the ids of a vocabulary (its ``DType.optimal_dtype``)."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32)


def check_corpus_writable(prefix: str, flag: str) -> None:
    """Raise ConfigError, before long work, if a file that belongs to no corpus has a name that a new corpus takes.

    A ``.bin`` belongs to the ``.idx`` beside it, which may be missing if a job was killed between their renames.
    """
    check_replaceable(idx_path(prefix), flag, is_ours=is_index)
    is_published = any(is_index(idx_path(name)) for name in (prefix, partial_prefix(prefix)))
    check_replaceable(bin_path(prefix), flag, is_ours=lambda path: is_published or path.stat().st_size == 0)
    check_metadata_writable(prefix, flag)


class CorpusWriter:
    """One corpus in the making, under temporary names beside its own.

    Args:
        prefix: path of the corpus without suffix.
        dtype: of its ids.
    """

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, dtype
        partial = partial_prefix(prefix)
        self.partial_idx = idx_path(partial)
        self.paths = (bin_path(partial), Path(f"{partial}.lengths"), Path(f"{partial}.sequences"))
        self.files: list[IO[bytes]] = []  # without buffers, so that a failed write is the end of it

    def open(self, sizes: Sizes = (0, 0, 0)) -> None:
        """Begin, or go on behind an earlier block, of which ``sizes`` tells; what stands behind it is cut off."""
        for path, size in zip(self.paths, sizes, strict=True):
            file = path.open("r+b" if size else "wb", buffering=0)
            self.files.append(file)
            file.truncate(size)
            file.seek(size)

    def append(self, ids: bytes, lengths: bytes, sequences: bytes) -> Sizes:
        """Write a block's ids, and as int32 the lengths of its sequences and the sequences of its documents."""
        for file, data in zip(self.files, (ids, lengths, sequences), strict=True):
            write_all(file, data)
        return self.sizes()

    def sizes(self) -> Sizes:
        """Where the files end."""
        ids, lengths, sequences = (file.tell() for file in self.files)
        return ids, lengths, sequences

    def has(self, sizes: Sizes) -> bool:
        """Do the temporary files reach that far?"""
        return all(path.is_file() and path.stat().st_size >= size for path, size in zip(self.paths, sizes, strict=True))

    def compose(self) -> None:
        """Put everything on the disk, the index too, still under temporary names."""
        self.close()
        for path in self.paths:
            sync(path)
        write_index(self.partial_idx, self.dtype, self.paths[1], self.paths[2])

    def publish(self) -> None:
        """Give the corpus its name; may be called again after it was interrupted."""
        for partial, path in ((self.paths[0], bin_path(self.prefix)), (self.partial_idx, idx_path(self.prefix))):
            if partial.is_file():
                publish(partial, path)

    def close(self) -> None:
        while self.files:
            self.files.pop().close()

    def remove(self) -> None:
        """Take the temporary files away."""
        self.close()
        for path in (*self.paths, self.partial_idx):
            path.unlink(missing_ok=True)


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write all of ``data`` to a file without a buffer, which may take less at once.

    Raises:
        OSError: the disk is full.
    """
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def write_index(path: Path, dtype: np.dtype, lengths: Path, sequences: Path) -> None:
    """Compose an ``.idx`` file, equal to that of Megatron-Core's builder, in constant memory.

    Args:
        path: where to write it.
        dtype: of the ids in ``.bin``.
        lengths: file of int32, the tokens of each sequence.
        sequences: file of int32, the number of sequences of each document.
    """
    counts = [file.stat().st_size // 4 for file in (lengths, sequences)]
    with path.open("wb") as index:
        index.write(packed_header(dtype, *counts))
        for chunk in _read(lengths):
            index.write(chunk.tobytes())
        offset = 0
        for chunk in _read(lengths):
            starts, offset = byte_offsets(chunk, offset, dtype)
            index.write(starts.tobytes())
        index.write(np.zeros(1, np.int64).tobytes())
        documents = 0
        for chunk in _read(sequences):
            boundaries = documents + np.cumsum(chunk, dtype=np.int64)
            index.write(boundaries.tobytes())
            documents = int(boundaries[-1])
    sync(path)


def _read(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while data := file.read(4 * AT_ONCE):
            yield np.frombuffer(data, np.int32)
