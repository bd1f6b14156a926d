"""Content checksums of large files, shared among all ranks and a few threads of each.

A file's checksum is the XXH3-128 hash of the XXH3-128 hashes of its blocks of 16 MiB. Blocks, not files, are shared,
so that one large file does not occupy one rank alone; a thousand ranks each read a thousandth of the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import xxhash

from megatron_slm.runtime.collective import gather_on_first_rank, on_first_rank
from megatron_slm.runtime.errors import unreadable

BLOCK_BYTES = 16 << 20
THREADS = 8

_Block = tuple[int, int]  # number of the file, offset of the block


def text_checksum(text: str) -> str:
    """Return the checksum of a short text."""
    return f"xxh3:{xxhash.xxh3_128(text.encode('utf-8')).hexdigest()}"


def file_checksums(paths: Sequence[Path], what: str, *, start: int = 0) -> list[str]:
    """Return the checksum of the content of each file. Collective over all ranks, which must see the same files.

    Args:
        paths: regular files; every rank passes the same.
        what: the flag or the role of the files, which begins every error message.
        start: offset of the first byte that counts.

    Raises:
        ConfigError: a file cannot be read; on every rank.
    """
    sizes = on_first_rank(lambda: [_size(path, what) for path in paths])
    blocks = [(number, offset) for number, size in enumerate(sizes) for offset in range(start, size, BLOCK_BYTES)]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = blocks[rank::world]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        found = dict(zip(mine, threads.map(lambda block: _hash_block(paths[block[0]], block[1]), mine), strict=True))
    gathered = gather_on_first_rank(found)
    return on_first_rank(lambda: _combine(paths, blocks, {k: v for part in gathered for k, v in part.items()}, what))


def _size(path: Path, what: str) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(what, path, error) from error


def _hash_block(path: Path, offset: int) -> bytes | str:
    """Return the hash of one block, or the reason why it cannot be read, which is raised on all ranks together."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            return xxhash.xxh3_128(file.read(BLOCK_BYTES)).digest()
    except OSError as error:
        return error.strerror or str(error)


def _combine(paths: Sequence[Path], blocks: list[_Block], hashes: dict[_Block, bytes | str], what: str) -> list[str]:
    combined = [xxhash.xxh3_128() for _ in paths]
    for number, offset in blocks:
        digest = hashes[number, offset]
        if isinstance(digest, str):
            raise unreadable(what, paths[number], digest)
        combined[number].update(digest)
    return [f"xxh3:{each.hexdigest()}" for each in combined]
