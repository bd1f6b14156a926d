"""Workarounds and version differences of Megatron-Core's mixture of experts."""

from __future__ import annotations

import megatron.core
from megatron.core.transformer.moe import moe_utils


def counts_tokens_of_all_ranks() -> bool:
    """Return whether router losses are scaled by the tokens of all ranks that share a micro-batch (since 0.19)."""
    return tuple(int(part) for part in megatron.core.__version__.split(".")[:2]) >= (0, 19)


def define_te_general_gemm() -> None:
    """Define a name that Megatron-Core 0.16.1 uses but defines only with Transformer Engine."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
