"""The arithmetic between the matrix products as Triton kernels: one pass for the figures, one for the gradient.

The matrix products stay with cuBLAS, which is what Hopper runs fastest; the kernels read a block of logits while it is
still in the L2 cache. The running maximum and sum of a row follow Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.shard import Statistics

LARGEST_TILE = 4096  # entries of a row that one step of a program works on


@dataclass(frozen=True)
class TritonBlocks:
    """Block arithmetic of the engine ``triton``; arguments and results as :class:`blocks.BlockMath` says."""

    softcap: float | None
    z_loss: float

    def statistics(self, logits: Tensor, labels: Tensor, *, with_mean: bool, keep: bool) -> Statistics:
        rows, width = logits.shape
        result = Statistics.empty(rows, logits.device, with_mean)
        if not rows or not width:
            return result
        mean = result.mean if result.mean is not None else result.lse
        tile = _tile(width)
        _statistics_kernel[(rows,)](
            logits,
            labels,
            result.lse,
            result.label_logit,
            mean,
            width,
            logits.stride(0),
            self.softcap or 0.0,
            HAS_SOFTCAP=self.softcap is not None,
            WITH_MEAN=with_mean,
            TILE=tile,
            num_warps=_warps(tile),
        )
        return result

    def gradient(self, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
        rows, width = logits.shape
        if not rows or not width:
            return logits
        tile = _tile(width)
        _gradient_kernel[(rows, triton.cdiv(width, tile))](
            logits,
            labels,
            lse,
            width,
            logits.stride(0),
            self.softcap or 0.0,
            self.z_loss,
            HAS_SOFTCAP=self.softcap is not None,
            TILE=tile,
            num_warps=_warps(tile),
        )
        return logits

    def picked_gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, places: Tensor) -> Tensor:
        return self.gradient(logits.index_select(0, places), labels[places], lse[places])


def _tile(width: int) -> int:
    return min(triton.next_power_of_2(width), LARGEST_TILE)


def _warps(tile: int) -> int:
    return 8 if tile >= 2048 else 4


@triton.jit
def _capped(values, softcap):  # type: ignore[no-untyped-def]
    """softcap · tanh(values / softcap), with tanh x = 2 · sigmoid 2x − 1."""
    return softcap * (2.0 * tl.sigmoid(2.0 * values / softcap) - 1.0)


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    lse_out,
    label_logit_out,
    mean_out,
    width,
    stride,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: log-sum-exp, the label's logit, and the expected logit."""
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * stride
    highest = -float("inf")
    total = 0.0
    weighted = 0.0
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns < width
        values = tl.load(begin + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            values = _capped(values, softcap)
        new_highest = tl.maximum(highest, tl.max(tl.where(inside, values, -float("inf")), axis=0))
        weights = tl.where(inside, tl.exp(values - new_highest), 0.0)
        rescale = tl.exp(highest - new_highest)
        total = total * rescale + tl.sum(weights, axis=0)
        if WITH_MEAN:
            weighted = weighted * rescale + tl.sum(weights * values, axis=0)
        highest = new_highest
    tl.store(lse_out + row, highest + tl.log(total))
    if WITH_MEAN:
        tl.store(mean_out + row, weighted / total)
    label = tl.load(labels + row)
    here = (label >= 0) & (label < width)
    label_logit = tl.load(begin + label, mask=here, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        label_logit = _capped(label_logit, softcap)
    tl.store(label_logit_out + row, label_logit)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    lse,
    width,
    stride,
    softcap,
    z_loss,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row and tile: logits become their gradient, in place."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    place = logits + row * stride + columns
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        values = _capped(values, softcap)
    row_lse = tl.load(lse + row)
    label = tl.load(labels + row)
    gradient = tl.exp(values - row_lse) * (1.0 + 2.0 * z_loss * row_lse)
    gradient = tl.where(columns == label, gradient - 1.0, gradient)
    if HAS_SOFTCAP:
        share = values / softcap
        gradient = gradient * (1.0 - share * share)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)
