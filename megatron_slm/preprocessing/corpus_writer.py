"""Block-wise writing of a ``.bin/.idx`` corpus in constant memory, truncatable to an earlier block.

Sequence lengths and sequences per document are appended to two temporary files (int32 each). The ``.idx`` is composed
from them at the end, and only then are the files renamed to their final names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from megatron_slm.corpus.index import bin_path, byte_offsets, idx_path, is_index, packed_header, partial_prefix
from megatron_slm.corpus.metadata import check_metadata_writable
from megatron_slm.runtime.files import check_replaceable, publish, sync, write_all

INDEX_CHUNK = 1 << 20  # numbers held in memory while the index is composed
SMALL_VOCABULARY = 65500  # smaller vocabularies are stored as uint16
Sizes = tuple[int, ...]  # bytes of the .bin, lengths and sequences files


def corpus_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype in which Megatron-Core stores the ids of a vocabulary (``DType.optimal_dtype``)."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32)


def check_corpus_writable(prefix: str, flag: str) -> None:
    """Raise ConfigError if writing the corpus would replace a file that does not belong to a corpus.

    A ``.bin`` belongs to the ``.idx`` of the same prefix, or of the temporary prefix if a job was killed between the
    two renames.
    """
    check_replaceable(idx_path(prefix), flag, is_ours=is_index)
    is_published = any(is_index(idx_path(name)) for name in (prefix, partial_prefix(prefix)))
    check_replaceable(bin_path(prefix), flag, is_ours=lambda path: is_published or path.stat().st_size == 0)
    for path in (*_parts(prefix), idx_path(partial_prefix(prefix))):
        check_replaceable(path, flag)
    check_metadata_writable(prefix, flag)


class CorpusWriter:
    """Write one corpus under temporary names in its directory.

    Args:
        prefix: path of the corpus without suffix.
        dtype: dtype of the token ids.
    """

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.partial_idx = idx_path(partial_prefix(prefix))
        self.paths = _parts(prefix)
        self.files: list[IO[bytes]] = []  # unbuffered, so that a failed write leaves nothing pending

    def open(self, sizes: Sizes = (0, 0, 0)) -> None:
        """Open the temporary files, truncated to the ``sizes`` after an earlier block."""
        for path, size in zip(self.paths, sizes, strict=True):
            file = path.open("r+b" if size else "wb", buffering=0)
            self.files.append(file)
            file.truncate(size)
            file.seek(size)

    def append(self, ids: bytes, lengths: bytes, sequences: bytes) -> Sizes:
        """Append a block and return the new file sizes.

        Args:
            ids: token ids, of ``dtype``.
            lengths: int32 tokens of each sequence.
            sequences: int32 sequences of each document.
        """
        for file, data in zip(self.files, (ids, lengths, sequences), strict=True):
            write_all(file, data)
        return self.sizes()

    def sizes(self) -> Sizes:
        """Return the current sizes of the files."""
        ids, lengths, sequences = (file.tell() for file in self.files)
        return ids, lengths, sequences

    def has(self, sizes: Sizes) -> bool:
        """Return whether the temporary files have at least these sizes."""
        return all(path.is_file() and path.stat().st_size >= size for path, size in zip(self.paths, sizes, strict=True))

    def compose(self) -> None:
        """Compose the index and flush all files to disk, still under temporary names."""
        self.close()
        for path in self.paths:
            sync(path)
        write_index(self.partial_idx, self.dtype, self.paths[1], self.paths[2])

    def publish(self) -> None:
        """Rename the files to their final names; may be repeated after an interruption."""
        for partial, path in ((self.paths[0], bin_path(self.prefix)), (self.partial_idx, idx_path(self.prefix))):
            if partial.is_file():
                publish(partial, path)

    def close(self) -> None:
        while self.files:
            self.files.pop().close()

    def remove(self) -> None:
        """Remove the temporary files."""
        self.close()
        for path in (*self.paths, self.partial_idx):
            path.unlink(missing_ok=True)


def _parts(prefix: str) -> tuple[Path, Path, Path]:
    """Return the temporary files of ids, lengths and sequences."""
    partial = partial_prefix(prefix)
    return bin_path(partial), Path(f"{partial}.lengths"), Path(f"{partial}.sequences")


def write_index(path: Path, dtype: np.dtype, lengths: Path, sequences: Path) -> None:
    """Write an ``.idx`` file, identical to that of Megatron-Core's builder, in constant memory.

    Args:
        path: output path.
        dtype: dtype of the ids in ``.bin``.
        lengths: file of int32 tokens per sequence.
        sequences: file of int32 sequences per document.
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
        while data := file.read(4 * INDEX_CHUNK):
            yield np.frombuffer(data, np.int32)
