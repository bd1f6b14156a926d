"""Run Megatron-Core on machines without a GPU.

Megatron-Core hard-codes CUDA in factory calls (``device='cuda'``), ``.cuda()``, ``torch.cuda.*`` and type names such as
``torch.cuda.FloatTensor``. :func:`redirect_cuda_to_cpu` redirects all of these to the CPU for the process.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Replace CUDA by the CPU in the arguments of torch calls."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer groups parameters by type names such as "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # only useful for copies to a GPU
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **(kwargs or {}))


def _names_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class _CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron-Core's tracker of named random states, over torch's CPU generator."""

    def add(self, name: str, seed: int) -> None:
        assert name not in self.states_, f"the random state {name} was added twice"
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)


class _NoStream:
    """Placeholder of a CUDA stream or event for synchronous execution."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *_, **__: _NoStream()


@functools.cache
def redirect_cuda_to_cpu() -> None:
    """Redirect Megatron-Core's CUDA calls to the CPU for the rest of this process."""
    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": lambda seed: None,  # torch.manual_seed calls it
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "current_stream": lambda device=None: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _NoStream,
        "Event": _NoStream,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    vars(megatron_random).update(
        _get_cuda_rng_state=lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
        _CUDA_RNG_STATE_TRACKER=_CpuRNGStatesTracker(),
        _CUDA_RNG_STATE_TRACKER_INITIALIZED=True,
    )
    _CudaNamesMeanCpu().__enter__()
