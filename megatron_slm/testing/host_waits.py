"""Count operations for which the host would wait for a GPU, on a CPU."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGES = ("megatron_slm", "megatron")
TRANSPARENT = (__name__, "megatron_slm.mcore.cpu")  # modules between an operation and the line that calls it
ROOT = Path(__file__).parents[2]
DATA_DEPENDENT = (  # operations whose result is a host number, or has a size that the host must know
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"),
    *("is_nonzero", "bincount", "nonzero_numpy", "argwhere", "repeat_interleave"),
    "nanmedian",  # reads the number of values inside its GPU implementation
)
TO_HOST = (torch.Tensor.tolist, torch.Tensor.cpu)
FROM_HOST = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
# Functions whose waiting operations run on a CPU only.
CPU_ONLY = ("check_labels", "_stream_start", "_histograms", "_may_have_ties", "get_emb")


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count waiting operations in the block by operation and source line.

    Counted are results that the host reads, results whose size depends on values, and copies between host and device
    that block. On a CPU, tensors of host and device cannot be told apart: copies count if they name a device.
    """
    counts: Counter[str] = Counter()
    with _Calls(counts), _Operations(counts):
        yield counts


class _Operations(TorchDispatchMode):
    """Count operations below autograd, in forward and backward passes."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _waits(func.overloadpacket.__name__, args):
            _count(self.counts, func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Count copies between host and device, which are no operations on a CPU."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in TO_HOST or (func in FROM_HOST and kwargs.get("device") is not None) or _copies(func, args, kwargs):
            _count(self.counts, getattr(func, "__name__", str(func)))
        return func(*args, **kwargs)


def _waits(name: str, args: tuple[Any, ...]) -> bool:
    if name in DATA_DEPENDENT:
        return True
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        return False
    indices = [index for index in args[1] if isinstance(index, Tensor)]
    is_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    if not name.lstrip("_").startswith("index_put"):
        return is_mask
    is_scalar = args[2].dim() == 0  # a number, which a GPU fills in with one mask, and copies with other indices
    return is_scalar != (is_mask and len(indices) == 1)


def _copies(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call is a copy to a named device that blocks."""
    if func is not torch.Tensor.to or kwargs.get("non_blocking"):
        return False
    named = [*args[1:2], kwargs.get("device")]
    return any(isinstance(device, torch.device | str) for device in named)


def _count(counts: Counter[str], operation: str) -> None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] in PACKAGES and name not in TRANSPARENT:
            if frame.f_code.co_name not in CPU_ONLY:
                path = frame.f_code.co_filename
                shown = path.partition("site-packages/")[2] or str(Path(path).relative_to(ROOT))
                counts[f"{operation} at {shown}:{frame.f_lineno}"] += 1
            return
        frame = frame.f_back
    counts[f"{operation} outside of the packages"] += 1
