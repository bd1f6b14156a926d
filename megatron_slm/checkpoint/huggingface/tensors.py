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

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by name in safetensors files
SAFETENSORS_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
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
        self._files: dict[str, tuple[Any, str]] = {}  # published name -> open file, and the name in it
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
        file, stored = self._files[name]
        return file.get_tensor(stored)

    def describe(self, name: str) -> Tensor:
        """Return a tensor without data, with the shape and dtype of ``name``.

        Raises:
            ConfigError: the data type is not supported.
        """
        file, stored = self._files[name]
        view = file.get_slice(stored)
        shape, dtype = view.get_shape(), view.get_dtype()
        if dtype not in DTYPES:
            raise ConfigError(
                f"{self.flag}: {self.directory}: {name} has the data type {dtype}; supported are {', '.join(DTYPES)}. "
                "Convert the model to bf16 or fp32."
            )
        return torch.empty(shape, dtype=DTYPES[dtype], device="meta")

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
        for name in file.keys():  # noqa: SIM118 not a mapping
            is_bare = self.prefix and not name.startswith((self.prefix, "lm_head."))
            known = f"{self.prefix}{name}" if is_bare else name
            if known in self._files:
                raise ConfigError(f"{self.flag}: {path} contains {name}, which another file contains, too. {AGAIN}")
            self._files[known] = file, name

    def _open_safetensors(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except OSError as error:
            raise read_error(self.flag, path, error) from error
        except SafetensorError as error:
            raise ConfigError(f"{self.flag}: {path} is damaged or incomplete ({error}). {AGAIN}") from error


class _TorchFile:
    """Represent a torch file of tensors, mapped into memory, with the methods of an open safetensors file."""

    def __init__(self, path: Path, flag: str) -> None:
        try:
            self.tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if not all(isinstance(name, str) and _is_dense(value) for name, value in self.tensors.items()):
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
        return self.tensors[name].detach()

    def get_slice(self, name: str) -> _TorchView:
        return _TorchView(self.tensors[name])


class _TorchView:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return SAFETENSORS_DTYPES.get(self.tensor.dtype, str(self.tensor.dtype))


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def weight_files(directory: Path, flag: str) -> list[Path]:
    """Return the files with the weights: the single file, else those of an index; safetensors are preferred.

    The order is that of the transformers library, which may matter if a directory contains several.

    Raises:
        ConfigError: there is no such file, or a file that the index names is missing or in another directory.
    """
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _indexed_files(directory / index, flag)
    raise ConfigError(
        f"{flag}: {directory} contains no weights ({', '.join((*SINGLE_FILES[:1], *INDEX_FILES[:1]))}). {AGAIN}"
    )


def _indexed_files(index: Path, flag: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except OSError as error:
        raise read_error(flag, index, error) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{flag}: {index} is damaged ({error}). {AGAIN}") from error
    outside = [name for name in names if Path(name).name != name]
    refuse([f"{flag}: {index} names {name!r}, which is not a file of its directory. {AGAIN}" for name in outside])
    refuse([f"{flag}: {path}, which {index.name} names, is missing. {AGAIN}" for path in paths if not path.is_file()])
    return paths


def _shown(names: list[str]) -> str:
    further = f" and {len(names) - SHOWN_NAMES} more tensors" if len(names) > SHOWN_NAMES else ""
    return f"{', '.join(names[:SHOWN_NAMES])}{further}"
