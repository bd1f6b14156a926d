"""Redirection of Megatron-Core's CUDA calls to the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.overrides import BaseTorchFunctionMode

from megatron_slm.mcore.cpu import FACTORIES, redirect_cuda_to_cpu
from megatron_slm.testing.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs are used")
ARGUMENTS = {"randint": (9, (2,)), "full": ((2,), 0.0), "linspace": (0, 1, 2), "tensor": ([1, 2],)}
ARGUMENTS |= {"as_tensor": ([1, 2],)}
PINNED = ("empty", "full", "ones", "tensor", "zeros")


def _redirected(rank: int, world_size: int) -> list[str]:
    """Return the CUDA calls that are not redirected, after Megatron-Core's calls of all kinds."""
    redirect_cuda_to_cpu()
    value = torch.ones(2)
    moved = {
        "cuda": value.cuda(torch.cuda.current_device()),
        "to": value.to("cuda"),
        "to device": value.to(torch.device("cuda", 0), torch.float64),
        "to keyword": value.to(device="cuda:0", dtype=torch.float64),
    }
    for name in FACTORIES:
        arguments = (value, 1.0)[: 1 + (name == "full_like")] if name.endswith("_like") else ARGUMENTS.get(name, (2,))
        for device in ("cuda", torch.device("cuda", 0)):
            moved[name] = getattr(torch, name)(*arguments, device=device)
    for name in PINNED:
        moved[f"pinned {name}"] = getattr(torch, name)(*ARGUMENTS.get(name, (2,)), pin_memory=True)
    wrong = [name for name, tensor in moved.items() if tensor.device.type != "cpu" or tensor.is_pinned()]
    wrong += [name for name in ("to device", "to keyword") if moved[name].dtype != torch.float64]
    for mode in (nullcontext(), BaseTorchFunctionMode()):
        with mode:
            names = (value.bfloat16().type(), value.type(), value.to("cuda").device.type)
        if names != ("torch.cuda.BFloat16Tensor", "torch.cuda.FloatTensor", "cpu"):
            wrong.append(f"names {names}")
    if value.type(torch.float64).dtype != torch.float64 or value.to(torch.float64).dtype != torch.float64:
        wrong.append("conversions")
    if torch.zeros(2, device="meta").device.type != "meta" or value.to("meta").device.type != "meta":
        wrong.append("other devices")
    with torch.device("meta"):
        created = [getattr(torch, name)(*ARGUMENTS.get(name, (2,))) for name in PINNED]
        created += [torch.nn.Linear(2, 2).weight, torch.zeros(2, device="cpu").to("meta")]
    if any(tensor.device.type != "meta" for tensor in created):
        wrong.append("other devices of a context")
    if torch._C._len_torch_function_stack():
        wrong.append("a mode, which makes each call of torch slow")
    return wrong


def test_calls_are_redirected_without_a_cost_for_all_others() -> None:
    assert run_ranks(_redirected, 1, initialize=False) == [[]]


def _forked(rank: int, world_size: int) -> list[list[float]]:
    """Return numbers of a named random state in two blocks, and of the default state around them."""
    redirect_cuda_to_cpu()
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("dropout", 5)
    torch.manual_seed(7)
    numbers = [torch.rand(3).tolist()]
    for _ in range(2):
        with tracker.fork("dropout"):
            numbers.append(torch.rand(3).tolist())
        numbers.append(torch.rand(3).tolist())
    return numbers


def test_named_random_states_continue_and_leave_the_default_state() -> None:
    (numbers,) = run_ranks(_forked, 1, initialize=False)
    dropout, default = torch.Generator().manual_seed(5), torch.Generator().manual_seed(7)
    for values, state in zip(numbers, (default, dropout, default, dropout, default), strict=True):
        assert values == torch.rand(3, generator=state).tolist()
