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
from torch.utils import _device

CPU = torch.device("cpu")
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch that creates tensors on the CPU if it is asked for CUDA or for pinned memory."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if "pin_memory" in kwargs:  # only useful for copies to a GPU
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _redirect_methods() -> None:
    """Replace the methods of tensors that move them to a GPU, or return the name of their type.

    A ``TorchFunctionMode`` calls the replacement twice: torch looks methods up by name.
    """
    move, name_or_convert = torch.Tensor.to, torch.Tensor.type

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return move(tensor, *args, **kwargs)

    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = name_or_convert(tensor, *args, **kwargs)
        # The optimizer groups parameters by type names such as "torch.cuda.FloatTensor".
        return (
            f"torch.cuda.{result.removeprefix('torch.').removeprefix('cuda.')}" if isinstance(result, str) else result
        )

    methods = {"to": to, "type": type_, "cuda": lambda tensor, *_, **__: tensor}
    for name, method in methods.items():
        setattr(torch.Tensor, name, method)


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
    _device._device_constructors()  # fill its cache: otherwise "with torch.device" does not know the functions replaced
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _redirect_methods()
