"""The arithmetic between the matrix products, on one chunk of logits, in torch operations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_slm.objective.cross_entropy import LOWEST_LOGIT
from megatron_slm.objective.linear_cross_entropy.softmax import GradientFactors, Statistics
from megatron_slm.objective.vocab_shard import locate_labels

SLICE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}  # in fp32; remains in a core's cache between operations


ALIGNMENT = 64  # entries; rows of a chunk start at multiples, for vector loads and copies by tiles


class ChunkMath(Protocol):
    """Arithmetic on a chunk of logits [n, w] fp32; labels are counted from the chunk's first entry.

    Rows are aligned: the stride between them may exceed their width.
    """

    def statistics(self, logits: Tensor, labels: Tensor, *, with_entropy: bool, keep: bool) -> Statistics:
        """Return the statistics of the chunk's rows, and overwrite the logits.

        Args:
            keep: overwrite them by the values from which the gradient of a saved chunk is computed.
        """
        ...

    def gradient(
        self, logits: Tensor, labels: Tensor, factors: GradientFactors, saved_highest: Tensor | None
    ) -> Tensor:
        """Return the gradient of the logits [n, w] in the dtype of the matrix products; it may take their memory.

        Args:
            saved_highest: the largest logit of each row [n], if :meth:`statistics` saved the chunk; otherwise None.
        """
        ...

    def picked_gradient(
        self, logits: Tensor, row_indices: Tensor, labels: Tensor, factors: GradientFactors, saved_highest: Tensor
    ) -> Tensor:
        """Return the logit gradient of the given rows of a saved chunk, [p, w]; it may take the chunk's memory.

        Args:
            row_indices: [p] int64, ascending; labels, factors and ``saved_highest`` are those of these rows.
        """
        ...


class TorchChunkMath:
    """Implement :class:`ChunkMath` in torch operations, a few rows at a time.

    Intermediate results remain in the cache, and copies are limited to these rows. An object serves one pass and reuses
    the memory of these copies, because allocating memory from the system costs as much as the arithmetic.

    A saved chunk holds exponentials relative to its rows' largest logits, or with a soft-cap the capped logits, which
    the gradient needs.
    """

    def __init__(self, softcap: float | None, dtype: torch.dtype) -> None:
        self.softcap, self.dtype = softcap, dtype
        self._memory: Tensor | None = None

    def statistics(self, logits: Tensor, labels: Tensor, *, with_entropy: bool, keep: bool) -> Statistics:
        column, is_here = locate_labels(labels, logits.size(1))
        result = Statistics.empty(len(logits), logits.device, with_entropy)
        result.label_logit = self._cap(logits.gather(1, column[:, None]).squeeze(1)).masked_fill_(~is_here, 0.0)
        for rows in _few_rows(logits, len(logits)):
            values = self._cap(logits[rows])
            result.highest[rows] = values.amax(1)
            shift = result.highest[rows].clamp(min=torch.finfo(torch.float32).min)[:, None]  # no -inf - -inf
            shifted = values - shift if keep and self.softcap is not None else values.sub_(shift)
            if result.weighted is None:
                result.total[rows] = shifted.exp_().sum(1)
                continue
            exponentials = torch.exp(shifted, out=self._scratch(values))
            result.total[rows] = exponentials.sum(1)
            result.weighted[rows] = shifted.clamp_(min=LOWEST_LOGIT).mul_(exponentials).sum(1)  # 0 x -inf is NaN
            if keep and self.softcap is None:
                values.copy_(exponentials)
        return result

    def gradient(
        self, logits: Tensor, labels: Tensor, factors: GradientFactors, saved_highest: Tensor | None
    ) -> Tensor:
        for rows in _few_rows(logits, len(logits)):
            highest = None if saved_highest is None else saved_highest[rows]
            self._gradient(logits[rows], labels[rows], factors.select(rows), highest)
        return converted(logits, self.dtype)

    def picked_gradient(
        self, logits: Tensor, row_indices: Tensor, labels: Tensor, factors: GradientFactors, saved_highest: Tensor
    ) -> Tensor:
        for rows in _few_rows(logits, len(row_indices)):
            leading = logits[rows]
            picked = torch.index_select(logits, 0, row_indices[rows], out=self._scratch(leading))
            # No row is written before it is read: the indices ascend, so the i-th is i or more.
            leading.copy_(self._gradient(picked, labels[rows], factors.select(rows), saved_highest[rows]))
        return converted(logits[: len(row_indices)], self.dtype)

    def _gradient(
        self, values: Tensor, labels: Tensor, factors: GradientFactors, saved_highest: Tensor | None
    ) -> Tensor:
        """Turn a few rows of logits, or of a saved chunk, into their gradient in place."""
        column, is_here = locate_labels(labels, values.size(1))
        if saved_highest is None:
            self._cap(values)
        slope = 1 - (values / self.softcap).square() if self.softcap is not None else None
        if saved_highest is not None and slope is None:
            scale = (saved_highest - factors.highest).clamp(min=LOWEST_LOGIT).exp() * factors.scale
        else:
            values.sub_(factors.highest[:, None]).exp_()
            scale = factors.scale
        values.mul_(scale[:, None]).scatter_add_(1, column[:, None], -(factors.loss_weight * is_here)[:, None])
        return values if slope is None else values.mul_(slope)

    def _cap(self, values: Tensor) -> Tensor:
        """Apply the soft-cap, if there is one, in place."""
        return values if self.softcap is None else values.div_(self.softcap).tanh_().mul_(self.softcap)

    def _scratch(self, rows: Tensor) -> Tensor:
        """Return memory for a copy of a few rows; earlier content is overwritten."""
        if self._memory is None or self._memory.numel() < rows.numel():
            self._memory = torch.empty(rows.numel(), device=rows.device)
        return self._memory[: rows.numel()].view(rows.shape)


def slices(size: int, step: int) -> list[slice]:
    """Return ``range(size)`` in slices of ``step``; the last one may be shorter."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def largest(parts: list[slice]) -> int:
    """Return the size of the largest slice; 0 without slices."""
    return max((part.stop - part.start for part in parts), default=0)


def aligned_width(width: int) -> int:
    """Return the stride between the rows of a chunk of so many entries."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def empty_chunk(like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Return memory for a chunk of so many rows in another dtype, with the same width and stride between rows."""
    return like.new_empty(rows, like.stride(0), dtype=dtype)[:, : like.size(1)]


def converted(chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a chunk in ``dtype``, with the same stride between rows."""
    return chunk if chunk.dtype == dtype else empty_chunk(chunk, len(chunk), dtype).copy_(chunk)


def _few_rows(logits: Tensor, count: int) -> list[slice]:
    """Return slices of the ``count`` leading rows, limited to SLICE_BYTES; none if the chunk has no entries."""
    width = logits.size(1)
    return slices(count, max(SLICE_BYTES[logits.device.type] // (4 * width), 1)) if width else []
