"""Restricted unpickling for Megatron-Core's and torch's checkpoint readers.

Unpickling can call arbitrary functions. Checkpoints contain pickles in three places: ``.metadata`` (read by
``pickle.load``), ``common.pt`` and the objects in ``.distcp`` files (read by ``torch.load``, which may unpickle any
class by default or environment variable, and passes TorchScript archives to ``torch.jit.load``).
:func:`restricted_pickles` makes all of these use one unpickler with an explicit list of classes, none of which runs
code from the file. Applies to Megatron-Core 0.16.1 to 0.19.2 and torch 2.11 to 2.13.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import filesystem as torch_filesystem

from megatron_slm.mcore.patching import replaced_attributes

ALLOWED: dict[str, frozenset[str]] = {
    "builtins": frozenset({"set", "frozenset", "complex"}),
    "__builtin__": frozenset({"set", "frozenset", "complex"}),
    "collections": frozenset({"OrderedDict"}),
    "_io": frozenset({"BytesIO"}),
    "_codecs": frozenset({"encode"}),  # bytes in pickles of protocol 2
    "pathlib": frozenset({"PosixPath"}),
    "argparse": frozenset({"Namespace"}),  # arguments in Megatron-LM's common.pt
    "signal": frozenset({"Signals"}),
    "megatron.core.enums": frozenset({"ModelType"}),
    "megatron.core.transformer.enums": frozenset({"AttnBackend", "AttnMaskType"}),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset({"MCoreMetadata", "MCoreSavePlan"}),
    "numpy": frozenset({"dtype", "ndarray"}),
    "numpy.core.multiarray": frozenset({"_reconstruct"}),
    "numpy._core.multiarray": frozenset({"_reconstruct"}),
    "torch": frozenset({"Size", "device"})
    | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch._utils": frozenset({"_rebuild_tensor_v2", "_rebuild_parameter"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        }
    ),
    "torch.distributed.checkpoint.planner": frozenset({"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}),
}


class UnsafePickleError(pickle.UnpicklingError):
    """Pickle with a class or function outside the allowed list; the message names it and the file."""


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that resolves only the classes in :data:`ALLOWED`; torch derives a subclass from it."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            subject = f"{_Reader.file} holds" if _Reader.file else "the file holds"
            raise UnsafePickleError(f"{subject} {module}.{name}, which a checkpoint of data does not need")
        return super().find_class(module, name)


class _Reader:
    """Current file, for error messages."""

    file: str | None = None


def restricted_load(file: Any, **options: Any) -> Any:
    """Load a pickle with the restricted unpickler, as ``pickle.load`` does."""
    _Reader.file = getattr(file, "name", _Reader.file)
    return RestrictedUnpickler(file, **options).load()


def restricted_loads(data: bytes, **options: Any) -> Any:
    """Load a pickle from bytes with the restricted unpickler."""
    return RestrictedUnpickler(io.BytesIO(data), **options).load()


PICKLE = ModuleType("restricted_pickle", "The module pickle, with the restricted unpickler.")
vars(PICKLE).update({name: value for name, value in vars(pickle).items() if not name.startswith("_")})
vars(PICKLE).update(Unpickler=RestrictedUnpickler, load=restricted_load, loads=restricted_loads)


@contextmanager
def restricted_pickles() -> Iterator[None]:
    """Make torch and Megatron-Core use the restricted unpickler within the block."""
    plain_load, slice_file = torch.load, FileSystemReader._slice_file

    def load(file: Any, *positional: Any, **options: Any) -> Any:
        if isinstance(file, str) or hasattr(file, "__fspath__"):
            _Reader.file = str(file)
        options |= {"weights_only": False, "pickle_module": PICKLE}
        return plain_load(file, *positional[:1], **options)  # map_location; the caller's pickle module is ignored

    def slice_of(reader: FileSystemReader, file: Any, info: Any) -> Any:
        _Reader.file = getattr(file, "name", None)
        return slice_file(reader, file, info)

    with replaced_attributes(
        (torch, "load", load),
        (torch.jit, "load", _refuse_torchscript),
        (torch_filesystem, "pickle", PICKLE),
        (FileSystemReader, "_slice_file", slice_of),
    ):
        yield


def _refuse_torchscript(*_: Any, **__: Any) -> Any:
    raise UnsafePickleError(f"{_Reader.file} holds a TorchScript program, which a checkpoint of data does not need")
