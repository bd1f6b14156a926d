"""Import Megatron-Core without the backend of torch's compiler if there is no GPU.

Megatron-Core decorates its fused functions with ``torch.compile``, which imports the backend (one to two seconds of a
process) and would run the C++ compiler of the machine. Commands import this module before any module that imports
Megatron-Core. Versions 0.16 to 0.19.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_slm.mcore.patching import replaced_attributes


def _undecorated(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Return the function of a decorator with or without arguments, in place of ``torch.compile``."""
    return function if function is not None else lambda decorated: decorated


if not torch.cuda.is_available() and "megatron.core" not in sys.modules:
    with replaced_attributes((torch, "compile", _undecorated)):
        import megatron.core.models.gpt  # noqa: F401
