"""Transformer Engine: availability, version, and user buffers of overlapped tensor-parallel communication.

It is imported on GPUs only. Megatron-Core 0.16 to 0.19 uses local layers without a message if the import fails.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import version
from typing import Any

import torch


@cache
def engine_problem() -> str | None:
    """Return the reason why Transformer Engine cannot be used on a GPU; None if it can."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "it is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # such as undefined symbols, if it was built for another torch
        return f"it cannot be imported ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def engine_version() -> tuple[int, int]:
    """Return major and minor version of the installed Transformer Engine."""
    found = getattr(importlib.import_module("transformer_engine"), "__version__", None) or version("transformer_engine")
    major, minor = found.split(".")[:2]
    return int(major), int(minor)


def initialize_user_buffers(
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    tensor_parallel_size: int,
    settings: dict[str, Any],
    uses_fp8: bool,
    uses_high_precision: bool,
    bootstrap_backend: str,
) -> None:
    """Allocate the buffers in which Transformer Engine overlaps tensor-parallel communication. Collective.

    Args:
        shape: tokens and hidden size of a micro-batch on a context-parallel rank.
        dtype: dtype of the activations outside of FP8.
        tensor_parallel_size: number of tensor-parallel ranks.
        settings: settings by operation, of --tp-comm-overlap-cfg.
        uses_fp8: some layers run in FP8.
        uses_high_precision: some layers do not run in FP8.
        bootstrap_backend: backend that exchanges the addresses of the buffers.
    """
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    options: dict[str, Any] = {"shape": list(shape), "tp_size": tensor_parallel_size, "ub_cfgs": settings}
    options |= {"dtype": dtype, "bootstrap_backend": bootstrap_backend}
    if engine_version() >= (2, 7):
        modes = base.UserBufferQuantizationMode
        used = ((uses_fp8, modes.FP8), (uses_high_precision, modes.NONE))
        options["quantization_modes"] = [mode for is_used, mode in used if is_used]
    else:
        options["use_fp8"] = uses_fp8
    base.initialize_ub(**options)
    torch.cuda.synchronize()
