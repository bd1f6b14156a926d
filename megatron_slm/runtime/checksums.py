"""Content checksums of large files, computed in parallel by all ranks and several threads per rank.

A file's checksum is the XXH3-128 hash of the XXH3-128 hashes of its 16 MiB blocks. Work is distributed by block, not by
file, so that all ranks share a large file and a thousand ranks each read a thousandth of the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch.distributed as dist
import xxhash

from megatron_slm.runtime.collective import gather_on_every_rank, gather_on_first_rank, on_every_rank, on_first_rank
from megatron_slm.runtime.errors import read_error

BLOCK_BYTES = 16 << 20
THREADS = 8

_Block = tuple[int, int]  # file index, block offset
# First rank with the same files, all blocks (on that rank, so that rank 0 receives them once), hashes of this rank.
_Read = tuple[int, list[_Block], dict[_Block, bytes | str]]


def text_checksum(text: str) -> str:
    """Return the checksum of a short text."""
    return f"xxh3:{xxhash.xxh3_128(text.encode('utf-8')).hexdigest()}"


def file_checksums(paths: Sequence[Path], role: str, *, start: int = 0, just_written: bool = False) -> list[str]:
    """Return the content checksum of each file, as visible on this rank. Collective over all ranks.

    Ranks divide the reading of files in shared directories; each host reads its local copies.

    Args:
        paths: regular files, identical on every rank.
        role: flag or role of the files, which prefixes every error message.
        start: offset of the first byte to include.
        just_written: whether the ranks wrote the files together, so that all see the same files.

    Raises:
        ConfigError: a file is unreadable on some rank; raised on every rank.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    directories = dict.fromkeys(path.parent for path in paths)
    readers = list(range(world)) if just_written else ranks_with_same_files(directories, role)
    sizes = on_every_rank(lambda: [_size(path, role) for path in paths] if rank == readers[0] else [])
    sizes = gather_on_every_rank(sizes)[readers[0]]
    blocks = [(number, offset) for number, size in enumerate(sizes) for offset in range(start, size, BLOCK_BYTES)]
    local_blocks = blocks[readers.index(rank) :: len(readers)]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        digests = threads.map(lambda block: _hash_block(paths[block[0]], block[1]), local_blocks)
        found = dict(zip(local_blocks, digests, strict=True))
    gathered = gather_on_first_rank((readers[0], blocks if rank == readers[0] else [], found))
    checksums = on_first_rank(lambda: _combine(paths, gathered, role))
    return checksums[readers[0]]


def local_checksum(path: Path, role: str) -> str:
    """Return the content checksum of one file, read by several threads of this process. Not collective.

    Raises:
        ConfigError: the file is unreadable.
    """
    offsets = range(0, _size(path, role), BLOCK_BYTES)
    combined = xxhash.xxh3_128()
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        for digest in threads.map(partial(_hash_block, path), offsets):
            if isinstance(digest, str):
                raise read_error(role, path, digest)
            combined.update(digest)
    return f"xxh3:{combined.hexdigest()}"


def ranks_with_same_files(directories: Iterable[Path], role: str) -> list[int]:
    """Return the ranks with the same directories as this rank, not copies of them. Collective over all ranks.

    Raises:
        ConfigError: a directory is unreadable on some rank; raised on every rank.
    """
    views = gather_on_every_rank(on_every_rank(lambda: [_identity(directory, role) for directory in directories]))
    ours = views[dist.get_rank() if dist.is_initialized() else 0]
    return [rank for rank, view in enumerate(views) if view == ours]


def _identity(directory: Path, role: str) -> tuple[int, int]:
    try:
        status = directory.stat()
    except OSError as error:
        raise read_error(role, directory, error) from error
    return status.st_ino, status.st_mtime_ns  # device numbers differ between hosts


def _size(path: Path, role: str) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise read_error(role, path, error) from error


def _hash_block(path: Path, offset: int) -> bytes | str:
    """Return the hash of one block, or the reason of a read error, which all ranks raise together."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            return xxhash.xxh3_128(file.read(BLOCK_BYTES)).digest()
    except OSError as error:
        return error.strerror or str(error)


def _combine(paths: Sequence[Path], gathered: list[_Read], role: str) -> dict[int, list[str]]:
    """Return the checksums of each group of ranks with the same files, by the first rank of the group."""
    combined = {}
    hashes: dict[int, dict[_Block, bytes | str]] = {}
    for first, _, found in gathered:
        hashes.setdefault(first, {}).update(found)
    for rank, of_group in hashes.items():
        digests = [xxhash.xxh3_128() for _ in paths]
        for number, offset in gathered[rank][1]:
            digest = of_group[number, offset]
            if isinstance(digest, str):
                raise read_error(role, paths[number], digest)
            digests[number].update(digest)
        combined[rank] = [f"xxh3:{each.hexdigest()}" for each in digests]
    return combined
