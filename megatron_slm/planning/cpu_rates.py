"""Measured rates of one CPU thread; imports torch when the first rate is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

REPEATS = 5
WARM_UP = 2
VALUES = 1 << 22  # of elementwise operations: more than the caches hold


class MeasuredRates:
    """Implement :class:`megatron_slm.planning.cpu_time.Rates` by measurement, once per shape.

    Times are CPU times, the median of some repeats: a step consists of thousands of operations, and is never as fast as
    the fastest of each.
    """

    def product(self, rows: int, inner: int, columns: int) -> float:
        """Return the time of a matrix product, with the second factor transposed as a weight is."""
        return _product(rows, inner, columns)

    def attention(self, batch: int, heads: int, length: int, size: int) -> tuple[float, float]:
        """Return the times of causal attention, forward and backward."""
        return _attention(batch, heads, length, size)

    def elementwise(self, values: float) -> float:
        """Return the time of reading or writing values, from additions of large tensors."""
        return values * _addition() / (3 * VALUES)

    def statistics(self, rows: int, width: int) -> float:
        """Return the time of the softmax statistics of a chunk of logits, measured in the implementation of the run."""
        return _statistics(rows, width)

    def gradient(self, rows: int, width: int) -> float:
        """Return the time of the gradient of a chunk of saved exponentials."""
        return _gradient(rows, width)


@cache
def _product(rows: int, inner: int, columns: int) -> float:
    import torch

    if not rows or not columns:
        return 0.0
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    return _median(lambda: torch.matmul(left, right.t()))


@cache
def _attention(batch: int, heads: int, length: int, size: int) -> tuple[float, float]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    shape = (batch, heads, length, size)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape)

    def forward() -> Any:
        return scaled_dot_product_attention(query, key, value, is_causal=True)

    first = _median(forward)
    both = _median(lambda: torch.autograd.grad(forward(), (query, key, value), gradient))
    return first, both - first


@cache
def _addition() -> float:
    import torch

    left, right = torch.randn(VALUES), torch.randn(VALUES)
    return _median(lambda: torch.add(left, right))  # allocates its result, as the operations of a run do


@cache
def _statistics(rows: int, width: int) -> float:
    import torch

    from megatron_slm.objective.linear_cross_entropy.chunk_math import TorchChunkMath
    from megatron_slm.objective.linear_cross_entropy.softmax import Statistics

    math, total = TorchChunkMath(None, torch.float32), Statistics.empty(rows, torch.device("cpu"), with_entropy=False)
    logits, labels = torch.randn(rows, width), torch.zeros(rows, dtype=torch.int64)
    return _median(lambda: total.merge(math.statistics(logits, labels, with_entropy=False, keep=True)))


@cache
def _gradient(rows: int, width: int) -> float:
    import torch

    from megatron_slm.objective.linear_cross_entropy.chunk_math import TorchChunkMath
    from megatron_slm.objective.linear_cross_entropy.softmax import GradientFactors, SoftmaxNormalizer

    math, highest = TorchChunkMath(None, torch.float32), torch.zeros(rows)
    factors = GradientFactors.from_normalizer(SoftmaxNormalizer(highest, highest + 1), highest + 1, 0.0)
    chunk, labels = torch.rand(rows, width), torch.zeros(rows, dtype=torch.int64)
    return _median(lambda: math.gradient(chunk, labels, factors, highest))


def _median(action: Callable[[], object]) -> float:
    """Return the median CPU time of an action in seconds."""
    found = []
    for _ in range(WARM_UP + REPEATS):
        start = time.process_time()
        action()
        found.append(time.process_time() - start)
    return median(found[WARM_UP:])
