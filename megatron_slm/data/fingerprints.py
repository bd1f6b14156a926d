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


def files_fingerprint(paths: Iterable[Path]) -> str:
    """The fingerprint of files in the order given, hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb", buffering=0) as file:
            for start in _block_starts(size):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _block_starts(size: int) -> list[int]:
    if size <= BLOCK * BLOCKS:
        return list(range(0, size, BLOCK))
    return [index * (size - BLOCK) // (BLOCKS - 1) for index in range(BLOCKS)]


def corpus_fingerprint(prefix: str) -> str:
    """The fingerprint of a corpus: of its ``.idx`` and its ``.bin``."""
    return files_fingerprint([Path(f"{prefix}.idx"), Path(f"{prefix}.bin")])
