"""Stream the tensors of a checkpoint in Megatron-Core's format, without a model and with one tensor in memory."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_slm.checkpoint.weights import explained_load, root_cause


@dataclass(frozen=True)
class Piece:
    """Represent one entry on the leading axes (layers, experts) of a global tensor, to be written."""

    key: str
    axes: tuple[int, ...]  # sizes of the leading axes
    index: tuple[int, ...]  # position on them
    shape: tuple[int, ...]  # of the entry
    dtype: torch.dtype
    read: Callable[[], Tensor]  # returns the entry

    def write_item(self) -> WriteItem:
        """Return torch's description of the entry as a shard of the global tensor."""
        offsets = torch.Size([*self.index, *(0 for _ in self.shape)])
        sizes = torch.Size([*(1 for _ in self.axes), *self.shape])
        return WriteItem(
            index=MetadataIndex(self.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size([*self.axes, *self.shape]),
            ),
        )


class _StreamingPlanner(DefaultSavePlanner):
    """Planner that reads each entry when it is written."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__()
        items = [(piece, piece.write_item()) for piece in pieces]
        self.items = [item for _, item in items]
        self.pieces = {item.index: piece for piece, item in items}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self.items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece = self.pieces[write_item.index]
        return piece.read().reshape([*(1 for _ in piece.axes), *piece.shape])


def write_tensors(pieces: Iterable[Piece], directory: Path, common: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and common values to an existing directory, one entry at a time.

    Raises:
        OSError: a file cannot be written.
    """
    torch.save(common, directory / COMMON_STATE_FNAME)
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=False)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # there is no process group
            torch_checkpoint.save({}, storage_writer=writer, planner=_StreamingPlanner(pieces), no_dist=True)
    except CheckpointException as error:
        raise root_cause(error) from error
    config = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
    (directory / CONFIG_FNAME).write_text(config, encoding="utf-8")


class TensorStore:
    """Read the global tensors of a checkpoint directory in parts.

    Raises:
        ConfigError: the metadata are damaged or contain code.
    """

    def __init__(self, directory: Path, flag: str) -> None:
        self.directory, self.flag = directory, flag
        self._reader = FileSystemReader(directory)
        with explained_load(directory, flag):
            self._metadata = self._reader.read_metadata()

    def describe(self, key: str) -> Tensor | None:
        """Return a tensor without data, of the global shape and dtype; None if the checkpoint lacks it."""
        found = self._metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            return None
        return torch.empty(found.size, dtype=found.properties.dtype, device="meta")

    def keys(self) -> frozenset[str]:
        """Return the keys of all tensors."""
        entries = self._metadata.state_dict_metadata.items()
        return frozenset(key for key, value in entries if isinstance(value, TensorStorageMetadata))

    def read(self, key: str, index: tuple[int, ...]) -> Tensor:
        """Return the entry at ``index`` on the leading axes of a tensor.

        Raises:
            ConfigError: the file is damaged or contains code.
        """
        found = self._metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        entry = torch.empty(found.size[len(index) :], dtype=found.properties.dtype)
        for chunk in found.chunks:
            first, axes = chunk.offsets[: len(index)], range(len(index))
            if all(first[axis] <= index[axis] < first[axis] + chunk.sizes[axis] for axis in axes):
                part = self._read_chunk(key, chunk)[tuple(index[axis] - first[axis] for axis in axes)]
                starts = chunk.offsets[len(index) :]
                window = tuple(slice(at, at + size) for at, size in zip(starts, part.shape, strict=True))
                entry[window] = part
        return entry

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self.directory / place.relative_path
        with explained_load(self.directory, self.flag), path.open("rb") as file:
            data = io.BytesIO(self._reader._slice_file(file, place).read(place.length))
            return torch.load(data, map_location="cpu", weights_only=False).reshape(chunk.sizes)
