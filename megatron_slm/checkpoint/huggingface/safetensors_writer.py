"""Write sharded safetensors files one tensor at a time.

The library's functions take all tensors of a file. The format is simple: the length of the header (8 bytes, little
endian), a JSON header with dtype, shape and data offsets of each tensor, and the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from megatron_slm.checkpoint.huggingface.files import INDEX_FILES, SINGLE_FILES
from megatron_slm.checkpoint.huggingface.tensors import SAFETENSORS_DTYPES

ALIGNMENT = 8  # of the first tensor's data


@dataclass(frozen=True)
class Group:
    """Tensors that are computed together, such as the query, key and value projections of a layer."""

    names: tuple[str, ...]
    like: tuple[Tensor, ...]  # tensors without data, of the final shapes and dtypes
    compute: Callable[[], Sequence[Tensor]]

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return sum(_size(tensor) for tensor in self.like)


def write_model(
    groups: Sequence[Group], directory: Path, shard_bytes: int, advance: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Write all tensors to one file, or to several with an index, and return the names of the files.

    Args:
        directory: existing directory.
        shard_bytes: largest size of a file; a group is never divided.
        advance: called with the bytes written since the last call.

    Raises:
        OSError: a file cannot be written.
    """
    shards = _divide(groups, shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILES[0], shards[0], advance)
        return [SINGLE_FILES[0]]
    stem = Path(SINGLE_FILES[0]).stem
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, advance)
    places = {key: name for name, shard in zip(names, shards, strict=True) for group in shard for key in group.names}
    index = {
        "metadata": {"total_size": sum(group.size for group in groups)},
        "weight_map": dict(sorted(places.items())),
    }
    (directory / INDEX_FILES[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX_FILES[0]]


def _divide(groups: Sequence[Group], shard_bytes: int) -> list[list[Group]]:
    shards: list[list[Group]] = [[]]
    used = 0
    for group in groups:
        if used and used + group.size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(group)
        used += group.size
    return shards


def _write_file(path: Path, groups: Sequence[Group], advance: Callable[[int], None]) -> None:
    # Wider types first, so that every tensor is aligned to its type.
    ordered = sorted(groups, key=lambda group: -group.like[0].element_size())
    named = [(name, like) for group in ordered for name, like in zip(group.names, group.like, strict=True)]
    ends = list(accumulate(_size(like) for _, like in named))
    header = {"__metadata__": {"format": "pt"}} | {
        name: {
            "dtype": SAFETENSORS_DTYPES[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [end - _size(like), end],
        }
        for (name, like), end in zip(named, ends, strict=True)
    }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in ordered:
            for tensor, like in zip(group.compute(), group.like, strict=True):
                _write(file, tensor.to(like.dtype))
            advance(group.size)


def _write(file: IO[bytes], tensor: Tensor) -> None:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    file.write(data.numpy().data)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
