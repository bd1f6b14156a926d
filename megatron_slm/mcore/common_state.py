"""Let Megatron-Core 0.16 to 0.18 load checkpoints of 0.19 and later, whose common state is an object of a shard."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common
from torch.distributed.checkpoint import FileSystemReader

from megatron_slm.mcore.patching import replaced_attributes

KEY = "common_state/shard_0_1"


@contextmanager
def common_state_objects() -> Iterator[None]:
    """Read the common state from its object within the block, if a checkpoint has no ``common.pt``.

    Megatron-Core reads it by a method in 0.16, and by a function in 0.17 and 0.18.
    """
    owner = getattr(common, "TorchCommonLoadStrategy", serialization)
    plain = owner.load_common

    def load_common(*arguments: Any) -> Any:
        directory = Path(arguments[-1])
        return plain(*arguments) if (directory / common.COMMON_STATE_FNAME).is_file() else _load_object(directory)

    with replaced_attributes((owner, "load_common", load_common)):
        yield


def _load_object(directory: Path) -> Any:
    reader = FileSystemReader(directory)
    places = reader.read_metadata().storage_data.items()
    place = next((place for index, place in places if index.fqn == KEY), None)
    if place is None:
        raise FileNotFoundError(2, "neither this file nor the object common_state exists", directory / "common.pt")
    with (directory / place.relative_path).open("rb") as file:
        content = io.BytesIO(reader._slice_file(file, place).read(place.length))
    return torch.load(content, map_location="cpu", weights_only=False)[0]
