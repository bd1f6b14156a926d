"""Restricted unpickling for Megatron-Core's and torch's checkpoint readers.

Unpickling can call arbitrary functions. Checkpoints contain pickles in three places: ``.metadata`` (read by
``pickle.load``), ``common.pt`` and the objects in ``.distcp`` files (read by ``torch.load``, which may unpickle any
class by default or environment variable, passes TorchScript archives to ``torch.jit.load``, and files of early versions
to a reader that can write patches of source code). :func:`restricted_pickles` makes all of these use one unpickler with
an explicit list of classes, none of which runs code from the file; with ``--trust-checkpoint``, one that resolves every
class. Applies to Megatron-Core 0.16.1 to 0.19.2 and torch 2.11 to 2.13.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import filesystem as torch_filesystem

from megatron_slm.mcore.patching import replaced_attributes
from megatron_slm.mcore.pickle_classes import (
    GuardedUnpickler,
    Reading,
    UnsafePickleError,
    is_allowed,
    is_replaced,
    placeholder,
    refused,
)


class NumberType:
    """Implement the numeric types of numpy.dtype; in arrays of its other types, a file could forge addresses."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or re.fullmatch(r"[biufc]\d{1,2}", code) is None:
            raise pickle.UnpicklingError("an array of other values than numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class NumberArray(np.ndarray):
    """Array of numbers from a pickle."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, kind, is_fortran, content = state
        if not isinstance(kind, NumberType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array of other values than numbers")
        super().__setstate__((1, shape, kind.dtype, is_fortran, content))


_NUMPY = {  # replacements of numpy's unpickling functions, by name
    "dtype": NumberType,
    "ndarray": placeholder("numpy", "ndarray"),
    "_reconstruct": lambda *_: NumberArray(0),
}


class RestrictedUnpickler(GuardedUnpickler):
    """Unpickler for the classes in :mod:`megatron_slm.mcore.pickle_classes`; torch derives a subclass from it."""

    def find_class(self, module: str, name: str) -> Any:
        if Reading.is_trusted:
            return super().find_class(module, name)
        if is_allowed(module, name):
            if module.startswith("numpy"):
                return self.guarded(_NUMPY[name])
            with suppress(AttributeError, ImportError):  # a class of another version
                return self.resolve(module, name)
        if is_replaced(module):
            return placeholder(module, name)
        raise refused(module, name)


def restricted_load(file: Any, **options: Any) -> Any:
    """Load a pickle with the restricted unpickler, as ``pickle.load`` does."""
    Reading.file = getattr(file, "name", Reading.file)
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
            Reading.file = str(file)
        options |= {"weights_only": False, "pickle_module": PICKLE}
        return plain_load(file, *positional[:1], **options)  # map_location; the caller's pickle module is ignored

    def slice_of(reader: FileSystemReader, file: Any, info: Any) -> Any:
        Reading.file = getattr(file, "name", None)
        return slice_file(reader, file, info)

    with replaced_attributes(
        (torch, "load", load),
        (torch.jit, "load", _refuse_torchscript),
        (torch.serialization, "_legacy_load", _refuse_plain_pickle),
        (torch_filesystem, "pickle", PICKLE),
        (FileSystemReader, "_slice_file", slice_of),
    ):
        yield


def _refuse_torchscript(*_: Any, **__: Any) -> Any:
    raise UnsafePickleError(f"{Reading.file} holds a TorchScript program, which a checkpoint of data does not need")


def _refuse_plain_pickle(*_: Any, **__: Any) -> Any:
    raise pickle.UnpicklingError(f"{Reading.file or 'an object'} is not an archive of torch.save")
