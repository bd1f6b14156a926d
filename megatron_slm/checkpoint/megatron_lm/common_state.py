"""Read the common state and the list of shards of a ``torch_dist`` checkpoint, without torch.

The common state holds everything but tensors: arguments, iteration, schedule. Megatron-Core writes it to ``common.pt``,
and since 0.19 as the object ``common_state`` in a ``.distcp`` file. Both are archives of torch.save.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from megatron_slm.config.checkpoint_files import other_step
from megatron_slm.mcore.pickle_classes import DAMAGE, TRUST_REMEDY, UnsafePickleError, load_with_placeholders
from megatron_slm.runtime.errors import ConfigError, UnusableFileError, read_error
from megatron_slm.runtime.files import check_regular

COMMON_FILE, METADATA_FILE, FORMAT_FILE = "common.pt", ".metadata", "metadata.json"
OBJECT = "common_state/shard_0_1"


@dataclass(frozen=True)
class Shard:
    """Represent the location of one tensor shard or object."""

    key: str
    file: str  # below the checkpoint directory
    offset: int
    length: int


def read_common_state(directory: Path, flag: str) -> dict[str, Any]:
    """Return the common state; objects of Megatron's classes, and tensors, are placeholders.

    Raises:
        ConfigError: a file is unreadable, damaged, or contains code.
    """
    with _explained(directory, flag):
        path = directory / COMMON_FILE
        content = _load_archive(path.read_bytes(), str(path)) if path.is_file() else _load_object(directory, flag)
        if not isinstance(content, dict):
            raise ValueError("the common state is not a dictionary")
        return content


def read_shards(directory: Path, flag: str) -> list[Shard]:
    """Return the locations of all tensor shards and objects.

    Raises:
        ConfigError: ``.metadata`` is unreadable, damaged, or contains code.
    """
    with _explained(directory, flag):
        path = directory / METADATA_FILE
        check_regular(path)
        metadata = load_with_placeholders(path.read_bytes(), str(path))
        places = metadata.state["storage_data"].items()
        return [
            Shard(
                str(index.state["fqn"]),
                _file_name(place.state["relative_path"]),
                int(place.state["offset"]),
                int(place.state["length"]),
            )
            for index, place in places
        ]


def _file_name(path: Any) -> str:
    """Return the name of a data file; a path would leave the checkpoint directory."""
    if not isinstance(path, str) or path != Path(path).name:
        raise ValueError(f"{METADATA_FILE} names {path!r}, which is no file of the checkpoint")
    return path


def read_backend(directory: Path, flag: str) -> str:
    """Return the storage format that ``metadata.json`` names.

    Raises:
        ConfigError: the file is unreadable or damaged.
    """
    with _explained(directory, flag):
        check_regular(directory / FORMAT_FILE)
        content = json.loads((directory / FORMAT_FILE).read_text(encoding="utf-8"))
        return str(content["sharded_backend"])


def _load_object(directory: Path, flag: str) -> Any:
    shard = next((shard for shard in read_shards(directory, flag) if shard.key == OBJECT), None)
    if shard is None:
        raise ValueError(f"there is neither {COMMON_FILE} nor the object common_state")
    path = directory / shard.file
    check_regular(path)
    with path.open("rb") as file:
        file.seek(shard.offset)
        return _load_archive(file.read(shard.length), str(path))[0]


def _load_archive(content: bytes, file: str) -> Any:
    """Return the object that torch.save wrote, with placeholders for tensors."""
    with ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return load_with_placeholders(archive.read(name), file)


@contextmanager
def _explained(directory: Path, flag: str) -> Iterator[None]:
    """Convert errors of the block into a ConfigError with reason and remedy."""
    try:
        yield
    except UnsafePickleError as error:
        raise ConfigError(f"{flag}: {error}. {TRUST_REMEDY}") from error
    except OSError as error:
        raise read_error(flag, error.filename or directory, error) from error
    except (*DAMAGE, ValueError, LookupError, RuntimeError, MemoryError, StopIteration) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UnusableFileError(
            f"{flag}: the checkpoint {directory} is damaged: {reason}. {other_step(flag)}"
        ) from error
