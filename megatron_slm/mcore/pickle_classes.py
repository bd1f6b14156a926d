"""Classes and functions that pickles in checkpoints may name, and placeholders for them. Imports no torch.

None of the allowed classes runs code from the file. A pickle can also set attributes of the classes that it names, for
this and all later files; :class:`GuardedUnpickler` refuses this. Classes of other Megatron versions and of NeMo's
libraries occur in saved arguments; they become :class:`Placeholder` objects, so that nothing of them is imported.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
import zlib
from enum import Enum
from types import FunctionType
from typing import Any
from zipfile import BadZipFile

_DTYPES = {
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
}
ALLOWED: dict[str, frozenset[str]] = {
    "builtins": frozenset({"set", "frozenset", "complex"}),
    "__builtin__": frozenset({"set", "frozenset", "complex"}),
    "collections": frozenset({"OrderedDict"}),
    "_io": frozenset({"BytesIO"}),
    "_codecs": frozenset({"encode"}),  # bytes in pickles of protocol 2
    "pathlib": frozenset({"PosixPath"}),
    "argparse": frozenset({"Namespace"}),  # arguments in Megatron-LM's common state
    "types": frozenset({"SimpleNamespace"}),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset({"MCoreMetadata", "MCoreSavePlan"}),
    "numpy": frozenset({"dtype", "ndarray"}),
    "numpy.core.multiarray": frozenset({"_reconstruct"}),
    "numpy._core.multiarray": frozenset({"_reconstruct"}),
    "torch": frozenset({"Size", "device", *_DTYPES}),
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
# Packages whose other classes become placeholders.
PLACEHOLDER_PACKAGES = (
    *("megatron", "nemo", "nemo_run", "transformer_engine", "modelopt", "nvidia_resiliency_ext"),
    *("lightning", "lightning_fabric", "pytorch_lightning", "omegaconf", "datetime", "signal"),
)
TRUST_REMEDY = (
    "It could run code and was not loaded. Use a checkpoint from a trusted source, written by megatron_slm or "
    "Megatron-LM, or add --trust-checkpoint if you trust its author."
)
# Errors of damaged and hostile files in pickle, zipfile and the constructors of the allowed classes.
DAMAGE = (
    *(pickle.UnpicklingError, EOFError, BadZipFile, zlib.error, struct.error, UnicodeDecodeError),
    *(AttributeError, TypeError, IndexError, OverflowError, RecursionError),
)
# Classes that are imported although placeholders are requested.
_PLAIN = {"builtins", "__builtin__", "collections", "_codecs", "pathlib", "argparse", "types"}


class UnsafePickleError(pickle.UnpicklingError):
    """Pickle with a class or function outside the allowed list; the message names it and the file."""


_HEAP_TYPE = 1 << 9  # flag of classes whose attributes can be set


class GuardedUnpickler(pickle.Unpickler):
    """Unpickler whose pickles cannot change the classes and functions that they name."""

    _saved: dict[Any, dict[str, Any]]

    def resolve(self, module: str, name: str) -> Any:
        """Import an allowed class or function."""
        return self.guarded(super().find_class(module, name))

    def guarded(self, found: Any) -> Any:
        """Return a class or function whose later changes are noticed or have no effect."""
        if isinstance(found, FunctionType):
            return functools.partial(found)  # a new object, so that its attributes are not the function's
        if isinstance(found, type) and found.__flags__ & _HEAP_TYPE:
            for owner in (found, *(found if issubclass(found, Enum) else ())):
                self._saved.setdefault(owner, _attributes(owner))
        return found

    def load(self) -> Any:
        """Return the object.

        Raises:
            UnsafePickleError: the pickle changed a class; the change is reverted.
        """
        self._saved = {}
        try:
            content = super().load()
        except MemoryError as error:
            raise pickle.UnpicklingError("an object exceeds the memory") from error
        finally:
            changed = [owner for owner, saved in self._saved.items() if _reverted(owner, saved)]
        if changed:
            raise UnsafePickleError(f"{_subject()} a change of {', '.join(map(repr, changed))}")
        return content


def _attributes(owner: Any) -> dict[str, Any]:
    names = ("__name__", "__qualname__", "__bases__") if isinstance(owner, type) else ()
    return dict(vars(owner)) | {name: getattr(owner, name) for name in names}


def _reverted(owner: Any, saved: dict[str, Any]) -> bool:
    """Restore the attributes of a class or enumeration member, and return whether any differed."""
    found = _attributes(owner)
    changed = [name for name in found.keys() | saved.keys() if found.get(name, owner) is not saved.get(name, owner)]
    change = type if isinstance(owner, type) else object
    for name in changed:
        if name in saved:
            change.__setattr__(owner, name, saved[name])
        else:
            change.__delattr__(owner, name)
    return bool(changed)


class Reading:
    """Current file, for error messages, and whether the user trusts the checkpoint."""

    file: str | None = None
    is_trusted: bool = False


def trust_checkpoints(is_trusted: bool) -> None:
    """Set whether the pickles of checkpoints may name any class or function (--trust-checkpoint)."""
    Reading.is_trusted = is_trusted


def is_allowed(module: str, name: str) -> bool:
    """Return whether a pickle may name ``module.name``."""
    return name in ALLOWED.get(module, ())


def is_replaced(module: str) -> bool:
    """Return whether classes of ``module`` become placeholders unless they are allowed."""
    return module.split(".")[0] in PLACEHOLDER_PACKAGES


def refused(module: str, name: str) -> UnsafePickleError:
    """Return the error for a pickle that names ``module.name``."""
    return UnsafePickleError(f"{_subject()} {module}.{name}, which a checkpoint of data does not need")


def _subject() -> str:
    return f"{Reading.file} holds" if Reading.file else "the file holds"


class Placeholder:
    """Object of a class that is not imported; holds the pickled arguments and state."""

    arguments: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *arguments: Any, **_: Any) -> Placeholder:
        instance = super().__new__(cls)
        instance.arguments, instance.state = arguments, {}
        return instance

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state.update({str(name): value for name, value in state.items()})

    def __setitem__(self, name: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Ignore an element of a pickled list subclass."""


@functools.cache
def placeholder(module: str, name: str) -> type[Placeholder]:
    """Return the placeholder of a class or function."""
    return type(name, (Placeholder,), {"__module__": f"placeholder.{module}"})


class PlaceholderUnpickler(GuardedUnpickler):
    """Unpickler that imports plain containers only; objects of all other classes, and tensors, become placeholders."""

    def find_class(self, module: str, name: str) -> Any:
        if is_allowed(module, name) and module in _PLAIN:
            return self.resolve(module, name)
        is_storage = module == "torch" and name.endswith("Storage")  # torch maps these names itself
        if is_allowed(module, name) or is_replaced(module) or is_storage or Reading.is_trusted:
            return placeholder(module, name)
        raise refused(module, name)

    def persistent_load(self, identifier: Any) -> Placeholder:
        """Return a placeholder for the content of a tensor."""
        return Placeholder(identifier)


def load_with_placeholders(content: bytes, file: str) -> Any:
    """Load a pickle without importing torch or running code.

    Args:
        content: pickle.
        file: path of the file, for error messages.

    Raises:
        UnsafePickleError: the pickle names a class or function outside the allowed list.
    """
    Reading.file = file
    return PlaceholderUnpickler(io.BytesIO(content)).load()
