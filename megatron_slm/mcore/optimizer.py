"""Repairs of the optimizer state that Megatron-Core 0.16.1 to 0.19.2 describes, loads and shares wrongly."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers that Megatron-Core has chained, or the one that it made."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def repair_loading(optimizer: MegatronOptimizer) -> None:
    """Repair two faults of Megatron-Core 0.16.1 in loading optimizer state.

    The distributed optimizer copies every entry of a parameter's state from the checkpoint and fails with KeyError
    for entries that the checkpoint does not hold, such as the ``step`` of torch's AdamW: such entries keep their
    values. For SGD there is no function that allocates the state to load.
    """
    for part in optimizer_parts(optimizer):
        if getattr(part, "init_state_fn", None) is None:
            part.init_state_fn = allocate_momentum
        copy = getattr(part, "_set_main_param_and_optimizer_states", None)
        if copy is None:
            continue

        @wraps(copy)
        def with_present_values(
            model_param: torch.nn.Parameter, tensors: dict[str, Any], part: Any = part, copy: Any = copy
        ) -> None:
            copy(model_param, {**part._get_main_param_and_optimizer_states(model_param), **tensors})

        part._set_main_param_and_optimizer_states = with_present_values


def allocate_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give SGD with momentum its buffers; buffers of zeros give the same first update as none."""
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW its state before the first step; the distributed optimizer cannot describe it otherwise."""
    for part in optimizer_parts(optimizer):
        if not isinstance(part, DistributedOptimizer) or not isinstance(part.optimizer, torch.optim.Adam):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def separate_adam_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own ``step`` after loading; Megatron-Core hands all of them one tensor, which the
    next update would count up once per parameter."""
    for part in optimizer_parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
