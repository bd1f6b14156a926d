"""Finds a checkpoint on disk, makes sure that it is whole, and loads model weights from it.

A checkpoint is a folder in Megatron-Core's distributed format (``torch_dist``) with two files of ours beside it:
``config.yaml``, the resolved configuration of the run that wrote it, and ``manifest.json``, written last, with the
size of every file, so that a checkpoint that was cut short is told from a whole one before any rank reads it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch.distributed.checkpoint.api import CheckpointException

from megatron_slm.config.recipe import read_config
from megatron_slm.config.schema import Config
from megatron_slm.data.fingerprints import files_fingerprint
from megatron_slm.runtime.errors import ConfigError

# What Megatron-Core and torch raise for a checkpoint that cannot be read or written; torch's is no Exception.
CHECKPOINT_ERRORS = (
    *(CheckpointingException, CheckpointException, pickle.UnpicklingError),
    *(RuntimeError, KeyError, ValueError, OSError, EOFError),
)
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's name for "the newest step"
CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    consumed_samples: int
    tokenizer: dict[str, Any]  # name, fingerprint (sha256 of the model file), vocab_size
    layout: dict[str, int]  # tensor, pipeline and data parallel sizes of the run that wrote it
    files: dict[str, int]  # path below the checkpoint's folder -> size in bytes

    def write(self, directory: Path) -> None:
        (directory / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def step_directory(root: Path, step: int) -> Path:
    """The folder of one step, named as Megatron-LM names it."""
    return root / f"iter_{step:07d}"


def latest_step(root: Path) -> int | None:
    """The newest complete step below ``root``, or None where there is no checkpoint."""
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise ConfigError(
            f"{tracker} should hold the number of the newest step, but holds {text[:40]!r}. "
            "Write the number of a complete iter_* folder into it."
        )
    return int(text)


def checkpoint_directory(path: str, step: int | None, flag: str) -> Path:
    """The folder of a whole checkpoint: of ``step``, or the newest below ``path``.

    Args:
        path: what the user gave, a folder with a tracker file, or one ``iter_*`` folder itself.
        step: a step that the user asked for, or None.
        flag: the flag that gave ``path``, for the messages.

    Raises:
        ConfigError: nothing there, not a checkpoint of ours, or cut short.
    """
    root = Path(path)
    if not root.exists():
        raise ConfigError(f"{flag} {path}: there is no such folder. Give the --save folder of an earlier run.")
    if (root / MANIFEST_FILE).is_file() and step is None:
        directory = root
    else:
        found = step if step is not None else latest_step(root)
        if found is None:
            raise ConfigError(
                f"{flag} {path}: not a checkpoint (neither {TRACKER} nor {MANIFEST_FILE} is there). "
                "Give the --save folder of an earlier run."
            )
        directory = step_directory(root, found)
    _check_whole(directory, flag)
    return directory


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint folder."""
    return Manifest(**json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8")))


def saved_config(directory: Path) -> Config:
    """The resolved configuration of the run that wrote the checkpoint."""
    return read_config(directory / CONFIG_FILE)


def file_sizes(directory: Path) -> dict[str, int]:
    """Every file below ``directory`` and its size in bytes, in a fixed order."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}


def checkpoint_fingerprint(directory: Path) -> str:
    """The fingerprint of a whole checkpoint: of its manifest and of every file that the manifest names."""
    names = [MANIFEST_FILE, *sorted(read_manifest(directory).files)]
    return files_fingerprint(directory / name for name in names)


def _check_whole(directory: Path, flag: str) -> None:
    if not (directory / MANIFEST_FILE).is_file():
        raise ConfigError(
            f"{flag}: {directory} is not a complete checkpoint ({MANIFEST_FILE}, which is written last, is "
            "missing). Choose another step with --ckpt-step."
        )
    try:
        wanted = read_manifest(directory).files
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{flag}: {directory / MANIFEST_FILE} cannot be read ({error}).") from error
    there = file_sizes(directory)
    for name, size in wanted.items():
        if there.get(name) != size:
            got = "is missing" if name not in there else f"has {there[name]} bytes"
            raise ConfigError(
                f"{flag}: the checkpoint {directory} is damaged: {name} {got}, and was written with {size}. "
                "Copy it again, or choose another step with --ckpt-step."
            )


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Megatron-Core's sharded state of all model chunks; keys are global, so that any layout can read it."""
    metadata = ensure_metadata_has_dp_cp_group(None)
    states = (chunk.sharded_state_dict(metadata=metadata) for chunk in chunks)  # type: ignore[operator]
    return {f"model{index}": state for index, state in enumerate(states)}


def load_state(state: dict[str, Any], directory: Path, flag: str) -> dict[str, Any]:
    """Read ``state`` (sharded, as Megatron-Core describes it) from a checkpoint folder. Collective over all ranks.

    Raises:
        ConfigError: the checkpoint does not hold what the model needs, for example another size.
    """
    with _told(directory, flag):
        return dist_checkpointing.load(state, str(directory))


def holds(directory: Path, key: str, flag: str) -> bool:
    """Whether a checkpoint has an object of this name, of any rank.

    Raises:
        ConfigError: the checkpoint cannot be read.
    """
    with _told(directory, flag):
        return any(name.startswith(f"{key}/") for name in load_sharded_metadata(str(directory)))


@contextmanager
def _told(directory: Path, flag: str) -> Iterator[None]:
    try:
        yield
    except CHECKPOINT_ERRORS as error:
        raise ConfigError(
            f"{flag}: the checkpoint {directory} does not fit this run: {brief(error)}. "
            "Compare its config.yaml with the model's flags."
        ) from error


def brief(error: BaseException) -> str:
    """The last line of an error, where torch puts what happened on the rank that failed."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def put_weights(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Copy weights that :func:`load_state` has read into the model chunks."""
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"])


def load_weights(chunks: Sequence[torch.nn.Module], directory: Path, flag: str) -> None:
    """Load the weights alone, whatever the layout that wrote them. Collective over all ranks."""
    put_weights(chunks, load_state(model_state(chunks), directory, flag))
