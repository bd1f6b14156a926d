"""Arrangement of published tensors within one tensor of Megatron-Core.

Functions use only methods of the tensors, so that this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Layout(Protocol):
    """Conversion between the published tensors and one tensor of Megatron-Core, exact in every bit."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return Megatron-Core's tensor."""
        ...

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return the published tensors."""
        ...


@dataclass(frozen=True)
class Same:
    """Represent one tensor that is equal in both."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class Transposed:
    """Represent one matrix [in, out], as in GPT-2; Megatron-Core has [out, in]."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].t().contiguous()

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.t().contiguous()]


@dataclass(frozen=True)
class GateUp:
    """Gate and up projection, stacked in this order."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return stack(parts)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [part.contiguous() for part in tensor.chunk(2)]


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value projections, or their biases.

    Megatron-Core stores, for each query group, the rows of its queries, its key and its value.
    """

    heads: int
    groups: int
    width: int  # channels per head

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        query, key, value = parts
        per_group, rest = self.heads // self.groups, query.shape[1:]
        joined = query.new_empty((self.groups, per_group + 2, self.width, *rest))
        joined[:, :per_group] = query.reshape(self.groups, per_group, self.width, *rest)
        joined[:, per_group] = key.reshape(self.groups, self.width, *rest)
        joined[:, per_group + 1] = value.reshape(self.groups, self.width, *rest)
        return joined.reshape(-1, *rest)

    def split(self, tensor: Tensor) -> list[Tensor]:
        per_group, rest = self.heads // self.groups, tensor.shape[1:]
        grouped = tensor.reshape(self.groups, per_group + 2, self.width, *rest)
        parts = (grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1])
        return [part.reshape(-1, *rest).contiguous() for part in parts]


@dataclass(frozen=True)
class FusedQueryKeyValue:
    """Represent one tensor with all queries, then all keys, then all values on its last axis, as in GPT-2."""

    heads: int
    width: int

    @property
    def _separate(self) -> QueryKeyValue:
        return QueryKeyValue(self.heads, self.heads, self.width)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        rows = parts[0].t() if parts[0].dim() == 2 else parts[0]
        return self._separate.join(rows.chunk(3))

    def split(self, tensor: Tensor) -> list[Tensor]:
        rows = stack(self._separate.split(tensor))
        return [rows.t().contiguous() if rows.dim() == 2 else rows]


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts one below another."""
    joined = parts[0].new_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]))
    start = 0
    for part in parts:
        joined[start : start + part.shape[0]] = part
        start += part.shape[0]
    return joined
