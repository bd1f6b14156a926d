"""The arithmetic between the matrix products, on one block of logits, in torch operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.shard import Statistics


class BlockMath(Protocol):
    """What an engine does with a block of logits [n, w]; labels are counted from the block's first entry."""

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        """Memory that a logit of a block takes while it is worked on, its own included."""
        ...

    def statistics(self, logits: Tensor, labels: Tensor, scratch: Tensor, *, with_mean: bool) -> Statistics:
        """The figures of the block's rows. ``scratch``, of the shape and dtype of the logits, may be overwritten; it
        may be the logits themselves, which are lost then."""
        ...

    def gradient(self, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
        """∂(lossᵢ + ζ · lseᵢ²) / ∂logits [n, w] in the dtype of the logits, whose memory it may take.

        ``lse`` [n] fp32 is that of the whole row.
        """
        ...


@dataclass(frozen=True)
class TorchBlocks:
    """Block arithmetic of the engine ``chunked``; in place, with as few passes over the block as torch allows."""

    softcap: float | None
    z_loss: float

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        return (4 if dtype == torch.float32 else 6) + (0 if self.softcap is None else 8)

    def statistics(self, logits: Tensor, labels: Tensor, scratch: Tensor, *, with_mean: bool) -> Statistics:
        values = self._capped(logits)
        place, here = _label_place(labels, values.size(1))
        label_logit = values.gather(1, place).squeeze(1).masked_fill(~here, 0.0)
        # log_softmax is torch's only fused pass that finds maximum and sum together. The lse follows from any entry.
        first = values[:, 0].clone()
        log_p = torch._log_softmax(values, -1, False, out=scratch if values is logits else values)
        lse = first - log_p[:, 0]
        mean = (log_p.exp() * log_p).sum(1) + lse if with_mean else None
        return Statistics(lse, label_logit, mean)

    def gradient(self, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
        values = self._capped(logits)
        slope = 1 - (values / self.softcap).square() if self.softcap is not None else None
        values.sub_(lse[:, None]).exp_()
        if self.z_loss:
            values.mul_((1 + 2 * self.z_loss * lse)[:, None])
        place, here = _label_place(labels, values.size(1))
        values.scatter_add_(1, place, -here.float()[:, None])
        if slope is not None:
            values.mul_(slope)
        return values if values is logits else logits.copy_(values)

    def _capped(self, logits: Tensor) -> Tensor:
        """The logits in fp32 with the soft-cap on; the same memory where they are fp32 and have no soft-cap."""
        values = logits.float()
        return values if self.softcap is None else (values / self.softcap).tanh_().mul_(self.softcap)


def _label_place(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The label's column [n, 1], 0 where it is outside the block; and whether it is inside [n]."""
    here = (labels >= 0) & (labels < width)
    return labels.masked_fill(~here, 0)[:, None], here
