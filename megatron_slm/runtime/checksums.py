"""Content checksums of large files, shared among all ranks and a few threads of each.

A file's checksum is the XXH3-128 hash of the XXH3-128 hashes of its blocks of 16 MiB. Blocks, not files, are shared,
so that one large file does not occupy one rank alone; a thousand ranks each read a thousandth of the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import xxhash

from megatron_slm.runtime.collective import gather_on_every_rank, gather_on_first_rank, on_every_rank, on_first_rank
from megatron_slm.runtime.errors import unreadable

BLOCK_BYTES = 16 << 20
THREADS = 8

_Block = tuple[int, int]  # number of the file, offset of the block
_Read = tuple[list[int], list[_Block], dict[_Block, bytes | str]]  # ranks with the same files, all blocks, own hashes


def text_checksum(text: str) -> str:
    """Return the checksum of a short text."""
    return f"xxh3:{xxhash.xxh3_128(text.encode('utf-8')).hexdigest()}"


def file_checksums(paths: Sequence[Path], what: str, *, start: int = 0, just_written: bool = False) -> list[str]:
    """Return the checksum of the content of each file, as this rank sees it. Collective over all ranks.

    Ranks share the reading of files in directories that they share; a copy on a disk of one host is read there.

    Args:
        paths: regular files; every rank passes the same.
        what: the flag or the role of the files, which begins every error message.
        start: offset of the first byte that counts.
        just_written: all ranks have written the files together, so that they must be the same.

    Raises:
        ConfigError: a file cannot be read on some rank; on every rank.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    directories = dict.fromkeys(path.parent for path in paths)
    readers = list(range(world)) if just_written else ranks_with_same_files(directories, what)
    sizes = on_every_rank(lambda: [_size(path, what) for path in paths] if rank == readers[0] else [])
    sizes = gather_on_every_rank(sizes)[readers[0]]
    blocks = [(number, offset) for number, size in enumerate(sizes) for offset in range(start, size, BLOCK_BYTES)]
    mine = blocks[readers.index(rank) :: len(readers)]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        found = dict(zip(mine, threads.map(lambda block: _hash_block(paths[block[0]], block[1]), mine), strict=True))
    gathered = gather_on_first_rank((readers, blocks, found))
    checksums = on_first_rank(lambda: _combine(paths, gathered, what))
    return checksums[readers[0]]


def ranks_with_same_files(directories: Iterable[Path], what: str) -> list[int]:
    """Return the ranks that see the same directories as this rank, not copies of them. Collective over all ranks.

    Raises:
        ConfigError: a directory cannot be read on some rank; on every rank.
    """
    views = gather_on_every_rank(on_every_rank(lambda: [_identity(directory, what) for directory in directories]))
    ours = views[dist.get_rank() if dist.is_initialized() else 0]
    return [rank for rank, view in enumerate(views) if view == ours]


def _identity(directory: Path, what: str) -> tuple[int, int]:
    try:
        status = directory.stat()
    except OSError as error:
        raise unreadable(what, directory, error) from error
    return status.st_ino, status.st_mtime_ns  # the device has another number on each host


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


def _combine(paths: Sequence[Path], gathered: list[_Read], what: str) -> dict[int, list[str]]:
    """Return the checksums that each group of ranks with the same files has found, by its first rank."""
    combined = {}
    for rank, (readers, blocks, _) in enumerate(gathered):
        if rank != readers[0]:
            continue
        hashes = {block: digest for reader in readers for block, digest in gathered[reader][2].items()}
        digests = [xxhash.xxh3_128() for _ in paths]
        for number, offset in blocks:
            digest = hashes[number, offset]
            if isinstance(digest, str):
                raise unreadable(what, paths[number], digest)
            digests[number].update(digest)
        combined[rank] = [f"xxh3:{each.hexdigest()}" for each in digests]
    return combined
