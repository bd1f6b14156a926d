"""Fingerprints of files up to terabytes, computed from file sizes and blocks at fixed offsets.

A fingerprint is the sha256 over the size (8 bytes, little endian) and content of each file. Files above 64 MiB
contribute 64 blocks of 1 MiB at offsets i · (size − 1 MiB) ÷ 63 for i = 0 ... 63, which include the first
and the last byte. Fingerprints differ for another corpus, tokenizer, order or length; a change entirely between the
blocks of a larger file is not detected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 20
BLOCKS = 64
QUICK_BLOCK = 1 << 16  # block size of quick fingerprints, which are computed at every start of a run


def files_fingerprint(paths: Iterable[Path], block: int = BLOCK) -> str:
    """Return the fingerprint of an ordered list of files, hexadecimal; ``block`` is the block size in bytes."""
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
    """Return the offsets of the blocks to read from a file of ``size`` bytes."""
    if size <= block * BLOCKS:
        return list(range(0, size, block))
    return [index * (size - block) // (BLOCKS - 1) for index in range(BLOCKS)]


def corpus_fingerprint(prefix: str) -> str:
    """Return the fingerprint of a corpus, computed from its ``.idx`` and ``.bin``."""
    return files_fingerprint([Path(f"{prefix}.idx"), Path(f"{prefix}.bin")])


def quick_fingerprint(path: Path) -> str:
    """Return the fingerprint of a file, computed from its size and 64 blocks of 64 KiB."""
    return files_fingerprint([path], QUICK_BLOCK)


def corpus_identity(prefix: str) -> str:
    """Return the key of a corpus in the sample-index cache: a hash of the complete ``.idx`` and blocks of ``.bin``.

    The complete ``.idx`` is hashed because a sample index depends on the length of every document.
    """
    with Path(f"{prefix}.idx").open("rb") as file:
        index = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{index} {quick_fingerprint(Path(f'{prefix}.bin'))}".encode()).hexdigest()
