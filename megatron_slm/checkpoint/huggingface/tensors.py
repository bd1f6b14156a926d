"""Read the tensors of a published model one at a time: safetensors files, or torch files without code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_slm.checkpoint.huggingface.files import INDEX_FILES, SINGLE_FILES
from megatron_slm.runtime.errors import ConfigError, read_error, refuse

SHOWN_NAMES = 5  # in messages
AGAIN = "Download the model again."


class PublishedTensors:
    """Tensors of a model directory by name, opened once; a context manager.

    Args:
        prefix: prefix of the base model's tensors, which some checkpoints lack.

    Raises:
        ConfigError: a file is missing, damaged, or contains code.
    """

    def __init__(self, directory: Path, flag: str, prefix: str = "") -> None:
        self.directory, self.flag, self.prefix = directory, flag, prefix
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}  # published name -> open file
        try:
            for path in weight_files(directory, flag):
                self._open(path)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> PublishedTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files.clear()

    def names(self) -> frozenset[str]:
        """Return all names, with the prefix of the base model."""
        return frozenset(self._files)

    def read(self, name: str) -> Tensor:
        """Return a tensor in host memory."""
        file = self._files[name]
        stored = name if name in file.keys() else name.removeprefix(self.prefix)  # noqa: SIM118 not a mapping
        return file.get_tensor(stored)

    def describe(self, name: str) -> Tensor:
        """Return a tensor without data, with the shape and dtype of ``name``."""
        file = self._files[name]
        stored = name if name in file.keys() else name.removeprefix(self.prefix)  # noqa: SIM118
        view = file.get_slice(stored)
        return torch.empty(view.get_shape(), dtype=_dtype(view.get_dtype()), device="meta")

    def check_names(self, expected: Iterable[str], ignored: Iterable[str]) -> None:
        """Compare the names with those of the architecture.

        Args:
            expected: names of the tensors that the model needs.
            ignored: patterns of names that it does not need.

        Raises:
            ConfigError: a tensor is missing, or is not part of the architecture.
        """
        wanted, names = set(expected), self.names()
        unknown = {name for name in names - wanted if not any(re.search(pattern, name) for pattern in ignored)}
        problems = []
        if missing := sorted(wanted - names):
            problems.append(f"{self.flag}: {self.directory} lacks {_shown(missing)}. {AGAIN}")
        if unknown:
            problems.append(
                f"{self.flag}: {self.directory} contains {_shown(sorted(unknown))}, which the model of its config.json "
                "does not have. Correct config.json, or remove the tensors."
            )
        refuse(problems)

    def _open(self, path: Path) -> None:
        file = _TorchFile(path, self.flag) if path.suffix == ".bin" else self._open_safetensors(path)
        for name in file.keys():  # noqa: SIM118
            is_bare = self.prefix and not name.startswith((self.prefix, "lm_head."))
            known = f"{self.prefix}{name}" if is_bare else name
            if known in self._files:
                raise ConfigError(f"{self.flag}: {path} contains {name}, which another file contains, too. {AGAIN}")
            self._files[known] = file

    def _open_safetensors(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except OSError as error:
            raise read_error(self.flag, path, error) from error
        except SafetensorError as error:
            raise ConfigError(f"{self.flag}: {path} is damaged or incomplete ({error}). {AGAIN}") from error


class _TorchFile:
    """A torch file of tensors, mapped into memory, with the methods of an open safetensors file."""

    def __init__(self, path: Path, flag: str) -> None:
        try:
            self.tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if not all(isinstance(tensor, Tensor) for tensor in self.tensors.values()):
                raise TypeError("not a mapping of names to tensors")
        except OSError as error:
            raise read_error(flag, path, error) from error
        except Exception as error:  # torch raises many types for damaged files
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{flag}: {path} is damaged, or contains more than tensors, and was not loaded ({reason}). Convert the "
                "model to safetensors."
            ) from error

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> _TorchView:
        return _TorchView(self.tensors[name])


class _TorchView:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> torch.dtype:
        return self.tensor.dtype


SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def _dtype(name: str | torch.dtype) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    dtypes = {shown: dtype for dtype, shown in SAFETENSORS_DTYPES.items()}
    return dtypes.get(name, torch.uint8)  # other types are refused by their shape or by name


def weight_files(directory: Path, flag: str) -> list[Path]:
    """Return the files with the weights: those of an index, else the single file; safetensors are preferred.

    Raises:
        ConfigError: there is no such file, or a file that the index names is missing.
    """
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        if (directory / index).is_file():
            return _indexed_files(directory / index, flag)
        if (directory / single).is_file():
            return [directory / single]
    raise ConfigError(
        f"{flag}: {directory} contains no weights ({', '.join((*SINGLE_FILES[:1], *INDEX_FILES[:1]))}). {AGAIN}"
    )


def _indexed_files(index: Path, flag: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [index.parent / Path(name).name for name in names]
    except OSError as error:
        raise read_error(flag, index, error) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{flag}: {index} is damaged ({error}). {AGAIN}") from error
    refuse([f"{flag}: {path}, which {index.name} names, is missing. {AGAIN}" for path in paths if not path.is_file()])
    return paths


def _shown(names: list[str]) -> str:
    further = f" and {len(names) - SHOWN_NAMES} more tensors" if len(names) > SHOWN_NAMES else ""
    return f"{', '.join(names[:SHOWN_NAMES])}{further}"
