"""Measured rates of one CPU thread; imports torch when the first rate is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

REPEATS = 5
WARM_UP = 2
VALUES = 1 << 22  # of elementwise operations: more than the caches hold


class MeasuredRates:
    """Implement :class:`megatron_slm.planning.cpu_time.Rates` by measurement, once per shape.

    Times are CPU times, the minimum of some repeats, since other processes may use the machine.
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

    def exponentials(self, values: float) -> float:
        """Return the time of exponentials with their subtraction and sum."""
        return values * _exponential() / VALUES


@cache
def _product(rows: int, inner: int, columns: int) -> float:
    import torch

    if not rows or not columns:
        return 0.0
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    return _fastest(lambda: torch.matmul(left, right.t()))


@cache
def _attention(batch: int, heads: int, length: int, size: int) -> tuple[float, float]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    shape = (batch, heads, length, size)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape)

    def forward() -> Any:
        return scaled_dot_product_attention(query, key, value, is_causal=True)

    first = _fastest(forward)
    both = _fastest(lambda: torch.autograd.grad(forward(), (query, key, value), gradient))
    return first, both - first


@cache
def _addition() -> float:
    import torch

    left, right = torch.randn(VALUES), torch.randn(VALUES)
    return _fastest(lambda: torch.add(left, right))  # allocates its result, as the operations of a run do


@cache
def _exponential() -> float:
    import torch

    values, highest = torch.randn(512, VALUES // 512), torch.zeros(512, 1)
    return _fastest(lambda: values.clone().sub_(highest).exp_().sum(1))


def _fastest(action: Callable[[], object]) -> float:
    """Return the least CPU time of an action in seconds."""
    found = []
    for _ in range(WARM_UP + REPEATS):
        start = time.process_time()
        action()
        found.append(time.process_time() - start)
    return min(found[WARM_UP:])
