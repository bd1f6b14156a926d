"""Fingerprints of files that may hold terabytes: sizes, and blocks at fixed places.

A fingerprint is the sha256 over, for each file in turn, its size (eight bytes, little endian) and its content: all of
it up to 64 MiB, beyond that 64 blocks of 1 MiB that begin at i · (size − 1 MiB) ÷ 63 for i = 0 ... 63, so that
the first and the last byte are always among them. Another corpus, tokenizer, order, or length is told apart; a change
that lies wholly between the blocks of a larger file is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 20
BLOCKS = 64
QUICK_BLOCK = 1 << 16  # of quick fingerprints, which every start of a run computes


def files_fingerprint(paths: Iterable[Path], block: int = BLOCK) -> str:
    """Return the fingerprint of files in the order given, hexadecimal; ``block`` is the size of a block in bytes."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb", buffering=0) as file:
            for start in block_starts(size, block):
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()


def block_starts(size: int, block: int) -> list[int]:
    """Return the first bytes of the blocks of a file of ``size`` bytes that are read."""
    if size <= block * BLOCKS:
        return list(range(0, size, block))
    return [index * (size - block) // (BLOCKS - 1) for index in range(BLOCKS)]


def corpus_fingerprint(prefix: str) -> str:
    """The fingerprint of a corpus: of its ``.idx`` and its ``.bin``."""
    return files_fingerprint([Path(f"{prefix}.idx"), Path(f"{prefix}.bin")])


def quick_fingerprint(path: Path) -> str:
    """Return the fingerprint of a file from its size and 64 blocks of 64 KiB."""
    return files_fingerprint([path], QUICK_BLOCK)


def corpus_identity(prefix: str) -> str:
    """Return the fingerprint by which sample indices are cached: of the complete ``.idx`` and blocks of the ``.bin``.

    The complete ``.idx``, because a sample index is wrong for a corpus with any other length of a document.
    """
    with Path(f"{prefix}.idx").open("rb") as file:
        index = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{index} {quick_fingerprint(Path(f'{prefix}.bin'))}".encode()).hexdigest()
