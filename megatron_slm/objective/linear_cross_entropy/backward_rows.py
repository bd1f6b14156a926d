"""Numbers of rows that the backward passes of an LM head compute, read by the host for all heads together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_slm.runtime.host_reads import HostRead, HostReads


class BackwardRows:
    """Rows of one backward pass: those with a loss weight, and what is left of them after the forward pass.

    Selected tokens usually share one loss weight, the loss scale, by which gradients from the forward pass are
    multiplied; the median is robust against the others. Each row has a residual.
    """

    def __init__(self, host_reads: HostReads) -> None:
        self.chosen: Tensor | None = None  # rows with gradients from the forward pass, [N] bool; None without any
        self.residual: Tensor | None = None  # loss weight without a gradient, [N] fp32; None as before, as the next
        self.missing: Tensor | None = None  # rows with a residual that were not chosen, [N] bool
        self._host_reads = host_reads
        self._read: HostRead | None = None

    def request(self, loss_weight: Tensor) -> None:
        """Request the numbers for the loss weights of the rows, [N] fp32, unless they have been."""
        if self._read is not None:
            return
        counted = [loss_weight]
        shared = loss_weight.new_zeros(0)
        if self.chosen is not None:
            shared = median(loss_weight, self.chosen & (loss_weight != 0))
            self.residual = loss_weight - shared * self.chosen
            self.missing = (self.residual != 0) & ~self.chosen
            counted += [self.residual, self.missing]
        counts = torch.stack([values.count_nonzero() for values in counted])
        self._read = self._host_reads.request(torch.cat((shared.double(), counts.double())))

    def numbers(self, loss_weight: Tensor) -> list[float]:
        """Return the number of rows with a loss weight.

        With gradients from the forward pass, return the shared loss weight before, and the numbers of rows with a
        residual and of missing rows after it.
        """
        self.request(loss_weight)
        assert self._read is not None
        read, self._read = self._read, None
        return read.numbers()


def median(values: Tensor, counted: Tensor) -> Tensor:
    """Return the median of the counted values, [1]; 0 without one. For torch's nanmedian, the host waits for a GPU.

    Args:
        values: [n], n above 0.
        counted: [n] bool.
    """
    ascending = values.where(counted, torch.inf).sort().values
    middle = (counted.count_nonzero() - 1).clamp(min=0) >> 1
    return ascending.gather(0, middle[None]).nan_to_num(0.0, 0.0)


class _RequestTogether(torch.autograd.Function):
    """Return losses unchanged; the backward pass requests the numbers of all rows before that of any loss."""

    @staticmethod
    def forward(ctx: Any, rows: Sequence[BackwardRows], *losses: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = rows
        return tuple(loss.view_as(loss) for loss in losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for rows, gradient in zip(ctx.rows, gradients, strict=True):
            rows.request(gradient.reshape(-1).float())
        return None, *gradients


def request_together(rows: Sequence[BackwardRows], losses: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the losses of several heads, whose backward passes then wait for the device once."""
    return _RequestTogether.apply(rows, *losses)
