"""Save selected rows only, as a filtered backward pass could if its selection were known before the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from baselines.saved_values import Saved, SavedValues
from megatron_slm.mcore.layers import TorchAttention

PARTS = ("MLP", "norm of the MLP", "queries and attention outputs")


class KnownSelection(SavedValues):
    """Record the peak of the bytes of saved tensors, of which some parts of the layers save selected rows only.

    Unselected rows are zero in the backward pass: it does not read them, or multiplies them by gradients of zero.
    """

    def __init__(self, model: torch.nn.Module, selections: Sequence[Tensor], parts: Sequence[str]) -> None:
        """Prepare the passes of one step.

        Args:
            model: the only chunk, with a filtered backward pass.
            selections: selected tokens of its micro-batches, [s, b] bool.
            parts: of :data:`PARTS`.
        """
        super().__init__([model])
        self._waiting = iter(selections)
        self._selected = torch.empty(0)  # of the current micro-batch
        self._is_in_part = False
        self._complete: tuple[int, ...] = ()  # addresses of tensors whose rows are all saved: keys and values
        self._shared: dict[int, Tensor] = {}  # saved rows of tensors that a part saves again, by address of all rows
        self._handles = [model.register_forward_pre_hook(self._next)]
        for layer in (module for module in model.modules() if isinstance(module, TransformerLayer)):
            attention: Any = layer.self_attention
            modules = ([layer.mlp], [layer.pre_mlp_layernorm], [attention.core_attention, attention.linear_proj])
            for part, found in zip(PARTS, modules, strict=True):
                for module in found if part in parts else ():
                    self._handles.append(module.register_forward_pre_hook(self._enter))
                    self._handles.append(module.register_forward_hook(self._leave))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def _next(self, *_: Any) -> None:
        self._selected = next(self._waiting)

    def _enter(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._is_in_part = True
        self._complete = tuple(tensor.data_ptr() for tensor in inputs[1:3] if isinstance(tensor, Tensor))

    def _leave(self, module: torch.nn.Module, *_: Any) -> None:
        self._is_in_part = False
        if not isinstance(module, TorchAttention):  # whose output is the input of the next layer
            self._shared.clear()

    def _pack(self, tensor: Tensor) -> Any:
        order = self._order(tensor)
        if not self._is_in_part or order is None or tensor.data_ptr() in self._complete:
            return super()._pack(tensor)
        address = tensor.untyped_storage().data_ptr()
        if address not in self._shared:
            self._shared[address] = tensor.detach().permute(order)[self._selected]
        return _SavedRows(self, self._shared[address], tensor, order, self._selected)

    def _order(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Return the dimensions in the order [s, b, ...]; None if the tensor does not consist of rows."""
        length, batch = self._selected.shape
        if tensor.shape[:2] == (length, batch):
            return tuple(range(tensor.dim()))
        if tensor.dim() in (3, 4) and (tensor.size(0), tensor.size(2)) == (batch, length):  # [b, heads, s, ...]
            return (2, 0, 1, 3)[: tensor.dim()]
        return None


class _SavedRows(Saved):
    """Hold the selected rows of a tensor until autograd releases it."""

    def __init__(
        self, values: SavedValues, rows: Tensor, source: Tensor, order: tuple[int, ...], selected: Tensor
    ) -> None:
        super().__init__(values, rows)
        self.shape, self.stride, self.order, self.selected = source.shape, source.stride(), order, selected

    def unpack(self) -> Tensor:
        """Return the tensor with zeros in unselected rows."""
        restored = torch.empty_strided(self.shape, self.stride, dtype=self.tensor.dtype).zero_()
        rows = restored.permute(self.order)
        rows[self.selected] = self.tensor.reshape(-1, *rows.shape[2:])
        return restored
