"""Open and verify checkpoints, and load model weights from them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_common_state_dict, load_sharded_metadata
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_slm.checkpoint.requests import EXTRA_STATE, check_weights, weight_request
from megatron_slm.config.checkpoint_files import (
    MANIFEST_FILE,
    Manifest,
    check_sizes,
    other_step,
    read_manifest,
)
from megatron_slm.corpus.fingerprints import files_fingerprint
from megatron_slm.mcore.common_state import common_state_objects
from megatron_slm.mcore.loading import loading_strategy
from megatron_slm.mcore.pickle_classes import DAMAGE, TRUST_REMEDY, UnsafePickleError
from megatron_slm.mcore.pickles import restricted_pickles
from megatron_slm.runtime.checksums import file_checksums, ranks_with_same_files, text_checksum
from megatron_slm.runtime.collective import on_every_rank, on_first_rank
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError, UnusableFileError, read_error

# Exceptions that Megatron-Core and torch raise for an unreadable or unwritable checkpoint. torch's CheckpointException
# is a BaseException.
CHECKPOINT_ERRORS = (
    *(CheckpointingException, CheckpointException, RuntimeError, LookupError, ValueError, OSError, AssertionError),
    *DAMAGE,
)
VERIFY_FLAG = "--no-slm-verify-checksums"


def verify_checkpoint(directory: Path, flag: str, *, checksums: bool) -> None:
    """Validate a checkpoint's manifest and file sizes, and on request all contents. Collective over all ranks.

    Raises:
        ConfigError: the checkpoint is incomplete, unreadable or damaged; on every rank.
    """
    manifest = on_first_rank(lambda: check_complete(directory, flag))
    _check_copies(directory, manifest, flag)
    if checksums:
        _verify_checksums(directory, manifest, flag)


def _check_copies(directory: Path, manifest: Manifest, flag: str) -> None:
    """Validate file sizes once per copy, if hosts have separate copies of the directory. Collective over all ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    is_first = rank == ranks_with_same_files([directory], flag)[0]
    on_every_rank(lambda: check_sizes(directory, manifest, flag) if is_first and rank else None)


def _verify_checksums(directory: Path, manifest: Manifest, flag: str) -> None:
    """Compare every file with its checksum. Collective over all ranks."""
    if not manifest.checksums:
        notice(f"{flag}: {directory} has no checksums (written by an earlier version); only file sizes were verified.")
        return
    names = sorted(manifest.files)
    found = dict(zip(names, file_checksums([directory / name for name in names], flag), strict=True))
    on_every_rank(lambda: _compare_checksums(directory, manifest, found, flag))


def _compare_checksums(directory: Path, manifest: Manifest, found: dict[str, str], flag: str) -> None:
    for name, checksum in found.items():
        if manifest.checksums.get(name) != checksum:
            raise UnusableFileError(
                f"{flag}: the checkpoint {directory} is damaged: the content of {name} does not match its checksum. "
                f"{other_step(flag)} {VERIFY_FLAG} skips this check."
            )


def check_complete(directory: Path, flag: str) -> Manifest:
    """Return the manifest of a checkpoint after validating it and the file sizes. Not collective.

    Raises:
        ConfigError: the manifest is missing or damaged, or a file is missing or has another size.
    """
    manifest = read_manifest(directory, flag, text_checksum)
    check_sizes(directory, manifest, flag)
    return manifest


def checkpoint_fingerprint(directory: Path, flag: str) -> str:
    """Return the fingerprint of a complete checkpoint, computed from its manifest and the files listed in it."""
    names = [MANIFEST_FILE, *sorted(read_manifest(directory, flag).files)]
    return files_fingerprint(directory / name for name in names)


def load_state(state: dict[str, Any], directory: Path, flag: str) -> dict[str, Any]:
    """Load ``state`` (Megatron-Core's sharded state) from a checkpoint directory. Collective over all ranks.

    torch shares read errors among the ranks. Files that Megatron-Core reads earlier on each rank are checked by
    :func:`saved_shapes`, which must be called first.

    Raises:
        ConfigError: the checkpoint is unreadable or does not match the model, for example in size; on every rank.
    """

    def load() -> dict[str, Any]:
        with explained_load(directory, flag):
            return dist_checkpointing.load(state, str(directory), loading_strategy())

    return on_every_rank(load)


def check_metadata(directory: Path, flag: str) -> None:
    """Validate ``.metadata`` and ``common.pt``, for which torch would print a traceback. Collective over all ranks.

    Raises:
        ConfigError: a file is damaged or contains code; on every rank.
    """
    on_first_rank(lambda: _read_shapes(directory, flag))


def check_objects(directory: Path, flag: str) -> None:
    """Validate the objects in ``.distcp`` files that a run loads, such as random states; they are small.

    Raises:
        ConfigError: an object is damaged or contains code.
    """
    with explained_load(directory, flag):
        reader = FileSystemReader(directory)
        metadata = reader.read_metadata()
        for index, place in metadata.storage_data.items():
            is_object = isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
            if is_object and EXTRA_STATE not in index.fqn:
                with (directory / place.relative_path).open("rb") as file:
                    torch.load(io.BytesIO(reader._slice_file(file, place).read(place.length)), weights_only=False)


def saved_shapes(directory: Path, flag: str) -> dict[str, tuple[int, ...] | None]:
    """Return the global shapes of all tensors of a checkpoint by key, and None for objects. Collective over all ranks.

    Raises:
        ConfigError: a metadata file of the checkpoint is unreadable on some rank; on every rank.
    """
    return on_every_rank(lambda: _read_shapes(directory, flag))


def common_state(directory: Path, flag: str) -> dict[str, Any]:
    """Return the unsharded state of a checkpoint.

    Raises:
        ConfigError: ``common.pt`` is damaged or contains code.
    """
    with explained_load(directory, flag):
        state = load_common_state_dict(str(directory))
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("the common state is not a dictionary")
        return dict(state)


def _read_shapes(directory: Path, flag: str) -> dict[str, tuple[int, ...] | None]:
    common_state(directory, flag)
    with explained_load(directory, flag):
        entries = load_sharded_metadata(str(directory)).items()
        return {key: tuple(e.global_shape) if isinstance(e, ShardedTensor) else None for key, e in entries}


@contextmanager
def explained_load(directory: Path, flag: str) -> Iterator[None]:
    """Restrict unpickling in the block, and convert its errors into a ConfigError with reason and remedy."""
    try:
        with restricted_pickles(), common_state_objects():
            yield
    except CHECKPOINT_ERRORS as error:
        cause = root_cause(error)
        if isinstance(cause, OSError):
            raise read_error(flag, cause.filename or directory, cause) from error
        raise _explain(cause, directory, flag) from error


def root_cause(error: BaseException) -> BaseException:
    """Return the first exception that torch collected from the ranks, or the error itself."""
    if isinstance(error, CheckpointException) and error.failures:
        return root_cause(next(iter(error.failures.values()))[0])
    return error


def _explain(error: BaseException, directory: Path, flag: str) -> ConfigError:
    if isinstance(error, UnsafePickleError):
        return ConfigError(f"{flag}: {error}. {TRUST_REMEDY}")
    if isinstance(error, DAMAGE) or "PytorchStreamReader" in str(error):
        return UnusableFileError(f"{flag}: the checkpoint {directory} is damaged: {brief(error)}. {other_step(flag)}")
    return ConfigError(
        f"{flag}: the checkpoint {directory} does not match this run: {brief(error)}. "
        "Compare its config.yaml with the model flags."
    )


def brief(error: BaseException) -> str:
    """Return the last line of an error, which contains the reason on the failed rank."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def put_weights(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Copy weights from :func:`load_state` into the model chunks, which keep their ``_extra_state``."""
    for index, chunk in enumerate(chunks):
        present = {key: value for key, value in chunk.state_dict().items() if key.endswith(EXTRA_STATE)}
        chunk.load_state_dict({**loaded[f"model{index}"], **present})


def load_weights(chunks: Sequence[torch.nn.Module], directory: Path, flag: str) -> None:
    """Load the model weights, saved by any layout. Collective over all ranks."""
    saved = saved_shapes(directory, flag)
    check_weights(chunks, saved, directory, flag)
    put_weights(chunks, load_state(weight_request(chunks, saved), directory, flag))
