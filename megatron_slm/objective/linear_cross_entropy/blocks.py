"""The arithmetic between the matrix products, on one block of logits, in torch operations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.shard import Statistics

SLICE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}  # in fp32: what stays in a core's cache between the operations


class BlockMath(Protocol):
    """What an engine does with a block of logits [n, w]; labels are counted from the block's first entry."""

    def statistics(self, logits: Tensor, labels: Tensor, *, with_mean: bool, keep: bool) -> Statistics:
        """The figures of the block's rows. Unless ``keep``, the logits may be overwritten."""
        ...

    def gradient(self, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
        """∂(lossᵢ + ζ · lseᵢ²) / ∂logits [n, w] in the dtype of the logits, whose memory it may take.

        ``lse`` [n] fp32 is that of the whole row.
        """
        ...

    def picked_gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, places: Tensor) -> Tensor:
        """That of some rows alone, [p, w]; ``places`` [p] int64 ascend. The memory of all logits may be taken."""
        ...


class TorchBlocks:
    """Block arithmetic of the engine ``chunked``; some rows at a time, so that one operation finds in the cache what
    the one before it left there, and no copy is larger than these rows. An object serves one pass: its memory for
    these copies is used again, because fresh memory from the system costs as much as the arithmetic."""

    def __init__(self, softcap: float | None, z_loss: float) -> None:
        self.softcap, self.z_loss = softcap, z_loss
        self._memory: Tensor | None = None

    def statistics(self, logits: Tensor, labels: Tensor, *, with_mean: bool, keep: bool) -> Statistics:
        place, here = _label_place(labels, logits.size(1))
        first = self._cap(logits[:, 0].to(torch.float32, copy=True))
        label_logit = self._cap(logits.gather(1, place).squeeze(1).float()).masked_fill_(~here, 0.0)
        lse = torch.empty_like(first)
        mean = torch.empty_like(first) if with_mean else None
        for rows in _few_rows(logits, len(logits)):
            values = self._capped(logits[rows])
            # torch's only fused pass that finds maximum and sum together; the lse follows from any entry.
            out = self._scratch(values) if keep and self._is_in_place(logits) else values
            log_p = torch._log_softmax(values, -1, False, out=out)
            lse[rows] = first[rows] - log_p[:, 0]
            if mean is not None:
                mean[rows] = (log_p.exp() * log_p).sum(1) + lse[rows]
        return Statistics(lse, label_logit, mean)

    def gradient(self, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
        place, here = _label_place(labels, logits.size(1))
        for rows in _few_rows(logits, len(logits)):
            part = logits[rows]
            change = self._gradient(part, place[rows], here[rows], lse[rows])
            if not self._is_in_place(logits):
                part.copy_(change)
        return logits

    def picked_gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, places: Tensor) -> Tensor:
        lse = lse[places]
        place, here = _label_place(labels[places], logits.size(1))
        for rows in _few_rows(logits, len(places)):
            leading = logits[rows]
            out = self._scratch(leading) if self._is_in_place(logits) else None
            picked = torch.index_select(logits, 0, places[rows], out=out)
            # No row is written before it is read: the places ascend, so the i-th is i or more.
            leading.copy_(self._gradient(picked, place[rows], here[rows], lse[rows]))
        return logits[: len(places)]

    def _gradient(self, logits: Tensor, place: Tensor, here: Tensor, lse: Tensor) -> Tensor:
        """The gradient of a few rows, in fp32; the same memory where :meth:`_is_in_place`."""
        values = self._capped(logits)
        slope = 1 - (values / self.softcap).square() if self.softcap is not None else None
        values.sub_(lse[:, None]).exp_()
        if self.z_loss:
            values.mul_((1 + 2 * self.z_loss * lse)[:, None])
        values.scatter_add_(1, place, -here.float()[:, None])
        return values if slope is None else values.mul_(slope)

    def _capped(self, logits: Tensor) -> Tensor:
        """A few rows of logits in fp32 with the soft-cap on; the same memory where :meth:`_is_in_place`."""
        return logits if self._is_in_place(logits) else self._cap(self._scratch(logits).copy_(logits))

    def _cap(self, values: Tensor) -> Tensor:
        """``values`` in fp32 with the soft-cap on, in place where there is one."""
        return values if self.softcap is None else values.div_(self.softcap).tanh_().mul_(self.softcap)

    def _is_in_place(self, logits: Tensor) -> bool:
        return logits.dtype == torch.float32 and self.softcap is None

    def _scratch(self, rows: Tensor) -> Tensor:
        """Memory for a copy of a few rows in fp32; what it held is lost."""
        if self._memory is None or self._memory.numel() < rows.numel():
            self._memory = torch.empty(rows.numel(), device=rows.device)
        return self._memory[: rows.numel()].view(rows.shape)


def slices(size: int, step: int) -> list[slice]:
    """The range of ``size`` in parts of ``step``, the last one shorter where it does not divide."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _few_rows(logits: Tensor, rows: int) -> list[slice]:
    """So many of the leading ``rows`` of a block at a time as SLICE_BYTES says; none of a block without entries."""
    width = logits.size(1)
    return slices(rows, max(SLICE_BYTES[logits.device.type] // (4 * width), 1)) if width else []


def _label_place(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The label's column [n, 1], 0 where it is outside the block; and whether it is inside [n]."""
    here = (labels >= 0) & (labels < width)
    return (labels * here)[:, None], here
