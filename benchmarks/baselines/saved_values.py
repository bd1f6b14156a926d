"""Measure the memory of values that forward passes save for backward passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedValues:
    """Record the peak of the bytes of saved tensors, each storage once, in a ``with`` block."""

    def __init__(self, model_chunks: Iterable[torch.nn.Module]) -> None:
        """Exclude the parameters of the model."""
        parameters = (parameter for chunk in model_chunks for parameter in chunk.parameters())
        self._excluded = {_address(parameter) for parameter in parameters}
        self._uses: Counter[int] = Counter()  # of saved storages, by address
        self._hooks = saved_tensors_hooks(self._pack, lambda saved: saved.unpack())
        self.bytes = self.peak = 0

    def __enter__(self) -> SavedValues:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Any:
        return Saved(self, tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a saved tensor."""
        address = _address(tensor)
        self._uses[address] += 1
        if self._uses[address] == 1 and address not in self._excluded:
            self.bytes += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.bytes)

    def remove(self, tensor: Tensor) -> None:
        """Count a released tensor."""
        address = _address(tensor)
        self._uses[address] -= 1
        if self._uses[address] == 0 and address not in self._excluded:
            self.bytes -= tensor.untyped_storage().nbytes()


class Saved:
    """Hold a saved tensor until autograd releases it."""

    def __init__(self, values: SavedValues, tensor: Tensor) -> None:
        self.values, self.tensor = values, tensor.detach()
        values.add(self.tensor)

    def unpack(self) -> Tensor:
        """Return the tensor for the backward pass."""
        return self.tensor

    def __del__(self) -> None:
        self.values.remove(self.tensor)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
