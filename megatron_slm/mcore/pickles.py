"""Restricted unpickling for Megatron-Core's and torch's checkpoint readers.

A pickle can call any function when it is read. Checkpoints hold pickles in three places: ``.metadata`` (read with
``pickle.load``), ``common.pt`` and the objects inside ``.distcp`` files (read with ``torch.load``, which by default
or by environment variable may unpickle anything, and which hands TorchScript archives to ``torch.jit.load``).
:func:`restricted_pickles` makes all of these use one unpickler with an explicit list of classes, none of which runs
code from the file. Megatron-Core 0.16.1 to 0.19.2, torch 2.11 to 2.13.
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
    """A pickle names a class or function that is not on the list. The message names it and the file."""


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that resolves the classes of :data:`ALLOWED` only; torch derives a class of its own from it."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            where = f"{_Reader.file} holds" if _Reader.file else "the file holds"
            raise UnsafePickleError(f"{where} {module}.{name}, which a checkpoint of data does not need")
        return super().find_class(module, name)


class _Reader:
    """The file that is being read, for error messages."""

    file: str | None = None


def restricted_load(file: Any, **options: Any) -> Any:
    """Read one pickle, as ``pickle.load`` does, with the restricted unpickler."""
    _Reader.file = getattr(file, "name", _Reader.file)
    return RestrictedUnpickler(file, **options).load()


def restricted_loads(data: bytes, **options: Any) -> Any:
    """Read one pickle from bytes with the restricted unpickler."""
    return RestrictedUnpickler(io.BytesIO(data), **options).load()


PICKLE = ModuleType("restricted_pickle", "The module pickle, with the restricted unpickler.")
vars(PICKLE).update({name: value for name, value in vars(pickle).items() if not name.startswith("_")})
vars(PICKLE).update(Unpickler=RestrictedUnpickler, load=restricted_load, loads=restricted_loads)


@contextmanager
def restricted_pickles() -> Iterator[None]:
    """Let torch and Megatron-Core read pickles with the restricted unpickler only, for the block."""
    plain_load, slice_file = torch.load, FileSystemReader._slice_file

    def load(file: Any, *positional: Any, **options: Any) -> Any:
        if isinstance(file, str) or hasattr(file, "__fspath__"):
            _Reader.file = str(file)
        options |= {"weights_only": False, "pickle_module": PICKLE}
        return plain_load(file, *positional[:1], **options)  # map_location; a pickle module is not taken

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
