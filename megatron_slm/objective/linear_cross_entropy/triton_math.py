"""The arithmetic between the matrix products as Triton kernels: one pass for the statistics, one for the gradient.

The matrix products stay with cuBLAS, which is fastest on Hopper; the kernels read a chunk of logits while it is
still in the L2 cache. The running maximum and sum of a row follow Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_slm.objective.cross_entropy import LOWEST_LOGIT
from megatron_slm.objective.linear_cross_entropy.chunk_math import aligned_width, empty_chunk
from megatron_slm.objective.linear_cross_entropy.softmax import GradientFactors, Statistics

LARGEST_TILE = 4096  # entries of a row that one step of a program works on


@dataclass(frozen=True)
class TritonChunkMath:
    """Implement :class:`chunk_math.ChunkMath` by Triton kernels.

    Statistics do not change the logits, so a saved chunk holds logits.
    """

    softcap: float | None
    dtype: torch.dtype  # of the gradient

    def statistics(self, logits: Tensor, labels: Tensor, *, with_entropy: bool, keep: bool) -> Statistics:
        rows, width = logits.shape
        result = Statistics.empty(rows, logits.device, with_entropy)
        if not rows or not width:
            return result
        weighted = result.weighted if result.weighted is not None else result.total
        tile = _tile(width)
        _statistics_kernel[(rows,)](
            logits,
            labels,
            result.highest,
            result.total,
            result.label_logit,
            weighted,
            width,
            _padded(logits),
            logits.stride(0),
            self.softcap or 0.0,
            HAS_SOFTCAP=self.softcap is not None,
            WITH_ENTROPY=with_entropy,
            LOWEST=LOWEST_LOGIT,
            TILE=tile,
            num_warps=_warps(tile),
        )
        return result

    def gradient(
        self, logits: Tensor, labels: Tensor, factors: GradientFactors, saved_highest: Tensor | None
    ) -> Tensor:
        result = logits if logits.dtype == self.dtype else empty_chunk(logits, len(logits), self.dtype)
        return self._gradient(logits, None, labels, factors, result)

    def picked_gradient(
        self, logits: Tensor, row_indices: Tensor, labels: Tensor, factors: GradientFactors, saved_highest: Tensor
    ) -> Tensor:
        result = empty_chunk(logits, len(row_indices), self.dtype)  # programs would overwrite rows that others read
        return self._gradient(logits, row_indices, labels, factors, result)

    def _gradient(
        self, logits: Tensor, row_indices: Tensor | None, labels: Tensor, factors: GradientFactors, result: Tensor
    ) -> Tensor:
        """Write the gradient of the given rows, all if None, to ``result`` [p, w]."""
        rows, width = result.shape
        if not rows or not width:
            return result
        tile = _tile(width)
        _gradient_kernel[(rows, triton.cdiv(width, tile))](
            logits,
            result,
            labels if row_indices is None else row_indices,
            labels,
            *factors,
            width,
            _padded(logits),
            logits.stride(0),
            self.softcap or 0.0,
            PICKS_ROWS=row_indices is not None,
            HAS_SOFTCAP=self.softcap is not None,
            TILE=tile,
            num_warps=_warps(tile),
        )
        return result


def _padded(logits: Tensor) -> int:
    """Return the entries of a row that are read and written, with the padding of a chunk at its end.

    If this number is a multiple of 16, as the stride is, the compiler uses vector loads and stores for all entries.
    """
    rows_are_padded = logits.stride(0) == aligned_width(logits.size(1))
    return logits.stride(0) if rows_are_padded else logits.size(1)


def _tile(width: int) -> int:
    return min(triton.next_power_of_2(width), LARGEST_TILE)


def _warps(tile: int) -> int:
    return 8 if tile >= 2048 else 4


@triton.jit
def _capped(values, softcap):  # type: ignore[no-untyped-def]
    """Return softcap · tanh(values / softcap), with tanh x = 2 · sigmoid 2x − 1."""
    return softcap * (2.0 * tl.sigmoid(2.0 * values / softcap) - 1.0)


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    highest_out,
    total_out,
    label_logit_out,
    weighted_out,
    width,
    padded,
    stride,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    LOWEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: the largest logit, the sums relative to it, and the label's logit."""
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * stride
    highest = -float("inf")
    total = 0.0
    weighted = 0.0
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns < width
        values = tl.load(begin + columns, mask=columns < padded, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            values = _capped(values, softcap)
        values = tl.where(inside, values, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(values, axis=0))
        base = tl.maximum(new_highest, -3.0e38)  # no -inf - -inf
        weights = tl.exp(values - base)
        rescale = tl.exp(highest - base)
        if WITH_ENTROPY:  # 0 x -inf is NaN
            weighted = (weighted + total * tl.maximum(highest - base, LOWEST)) * rescale
            weighted += tl.sum(weights * tl.maximum(values - base, LOWEST), axis=0)
        total = total * rescale + tl.sum(weights, axis=0)
        highest = new_highest
    tl.store(highest_out + row, highest)
    tl.store(total_out + row, total)
    if WITH_ENTROPY:
        tl.store(weighted_out + row, weighted)
    label = tl.load(labels + row)
    here = (label >= 0) & (label < width)
    label_logit = tl.load(begin + label, mask=here, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        label_logit = _capped(label_logit, softcap)
    tl.store(label_logit_out + row, label_logit)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    gradient_out,
    row_indices,
    labels,
    highest,
    scale,
    loss_weight,
    width,
    padded,
    stride,
    softcap,
    PICKS_ROWS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row of the result and tile: the gradient of logits, which may take the place of all rows."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(row_indices + row) if PICKS_ROWS else row
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_memory = columns < padded
    values = tl.load(logits + source * stride + columns, mask=in_memory, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        values = _capped(values, softcap)
    label = tl.load(labels + row)
    gradient = tl.exp(values - tl.load(highest + row)) * tl.load(scale + row)
    gradient = tl.where(columns == label, gradient - tl.load(loss_weight + row), gradient)
    if HAS_SOFTCAP:
        share = values / softcap
        gradient = gradient * (1.0 - share * share)
    gradient = tl.where(columns < width, gradient, 0.0)
    tl.store(gradient_out + row * stride + columns, gradient.to(gradient_out.dtype.element_ty), mask=in_memory)
