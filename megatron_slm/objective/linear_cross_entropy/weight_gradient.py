"""Accumulation of the LM head's weight gradient for Megatron-Core."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.product import add_product


class WeightGradient:
    """Accumulate the gradient of one weight in its ``main_grad`` if it has one, else in a separate buffer.

    Megatron-Core's DDP gives every parameter a ``main_grad`` and adds ``grad`` to it in a hook, unless
    ``grad_added_to_main_grad`` marks this. The hook still requires a gradient from autograd, so a placeholder is
    returned: zeros if the weight has ``zero_out_wgrad``, as a tied embedding, whose gradient autograd adds to the
    placeholder (tensor_parallel/layers.py of Megatron-Core).
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.is_fused = hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
        self._sum: Tensor | None = weight.main_grad if self.is_fused else None  # type: ignore[attr-defined]

    @property
    def sum(self) -> Tensor:
        """Return the accumulated gradient [V / tp, h], initially zeros without a ``main_grad``."""
        if self._sum is None:
            self._sum = torch.zeros_like(self.weight)
        return self._sum

    def add_product(self, entries: slice, logit_gradient: Tensor, hidden: Tensor) -> None:
        """Add [n, w]ᵀ [n, h] to the rows ``entries`` of the gradient."""
        add_product(self.sum[entries], logit_gradient.t(), hidden)

    def add(self, part: Tensor, factor: float) -> None:
        """Add ``factor`` times a full gradient [V / tp, h]; the first one provides memory and dtype of the sum."""
        if self._sum is None:
            self._sum = part if factor == 1 else part.mul_(factor)
        else:
            self._sum.add_(part, alpha=factor)

    def result(self) -> Tensor:
        """Return the weight's gradient for autograd."""
        if not self.is_fused:
            return self.sum.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        make = torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight)
