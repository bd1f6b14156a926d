"""Optimizer updates in two phases, loss scaling, and workarounds for faults of Megatron-Core 0.16.1 to 0.19.2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

FUSED_DEVICES = {"cuda"}  # on which torch's Adam uses its fused kernel


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers chained by Megatron-Core, or the only one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


@dataclass(frozen=True)
class PreparedGradients:
    """Hold the norm of the unscaled gradients, and whether they overflowed fp16 at a loss scale that is now lower."""

    norm: float
    overflow: bool


@torch.no_grad()
def prepare_gradients(optimizer: MegatronOptimizer) -> PreparedGradients:
    """Copy the reduced, unscaled gradients to the optimizer's parameters. Collective over all ranks.

    Together with :func:`update_weights`, this is Megatron-Core's ``ChainedOptimizer.step``, divided so that an update
    can be refused by its gradient norm. An overflow at the minimum loss scale is not reported as one: no smaller scale
    could avoid it, so that the infinite norm is a divergence.
    """
    scalers = dynamic_scalers(optimizer)
    before = [scaler.state_dict() for scaler in scalers]
    overflow = bool(optimizer.prepare_grads())
    if len(scalers) > 1:
        overflow = _update_together(scalers, before, overflow)
    if scalers:
        lowest = float(before[0]["scale"]) <= float(scalers[0].min_scale)
        overflow = overflow and not (lowest and scalers[0]._hysteresis_tracker <= 0)
    return PreparedGradients(float(optimizer.get_grad_norm()), overflow and bool(scalers))


def dynamic_scalers(optimizer: MegatronOptimizer) -> list[DynamicGradScaler]:
    """Return the dynamic loss scalers of all parts of the optimizer; none without --fp16."""
    found = (getattr(part, "grad_scaler", None) for part in optimizer_parts(optimizer))
    return [scaler for scaler in found if isinstance(scaler, DynamicGradScaler)]


def _update_together(scalers: list[DynamicGradScaler], before: list[dict[str, Any]], overflow: bool) -> bool:
    """Update the scalers of several optimizers equally; return whether any rank found an overflow.

    Megatron-Core (0.16 to 0.19) updates the scaler of the dense weights and that of the experts by their overflows, but
    scales the loss by the first one only. After an overflow in one of them, the other's gradients would be wrong.
    """
    flag = torch.tensor([float(overflow)], device=scalers[0].scale.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    for scaler, state in zip(scalers, before, strict=True):
        scaler.load_state_dict(state)
        scaler.update(bool(flag.item()))
    return bool(flag.item())


def load_loss_scale(optimizer: MegatronOptimizer, saved: Any) -> None:
    """Restore the dynamic loss scale from a saved optimizer state, which may have none."""
    state = _find_scaler(saved)
    for scaler in dynamic_scalers(optimizer) if state else ():
        scaler.load_state_dict(state)


def _find_scaler(saved: Any) -> dict[str, Any] | None:
    """Return the first scaler in the state of one or several optimizers."""
    if not isinstance(saved, dict):
        return None
    if isinstance(scaler := saved.get("grad_scaler"), dict):
        return scaler or None
    return next((found for part in saved.values() if (found := _find_scaler(part))), None)


@torch.no_grad()
def update_weights(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the prepared gradients, whose norm is ``grad_norm``, and update the weights."""
    for part in optimizer_parts(optimizer):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=uses_decoupled_gradients(part),
            )
    optimizer.step_with_ready_grads()


def uses_decoupled_gradients(part: Any) -> bool:
    """Return whether gradients are in ``decoupled_grad``, as with Transformer Engine's precision-aware Adam."""
    return part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def gradients_of_norm(
    part: Any, parameters: Iterable[torch.nn.Parameter]
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield the model parameters and prepared gradients that contribute to the gradient norm on this rank.

    Args:
        part: an optimizer of :func:`optimizer_parts`; its ``get_grad_stats_parallel_group`` sums the norm.
        parameters: parameters of the model.
    """
    shards = getattr(part, "model_param_group_index_map", None)  # of the distributed optimizer
    held = set(map(id, part.get_parameters()))
    name = "decoupled_grad" if uses_decoupled_gradients(part) else "grad"
    for parameter in parameters:
        main = getattr(parameter, "main_param", None)
        main = parameter if main is None else main
        if shards is not None:
            if parameter not in shards:
                continue
            group, place = shards[parameter]
            main = part.optimizer.param_groups[group]["params"][place]
        is_counted = param_is_not_shared(main) and param_is_not_tensor_parallel_duplicate(main)
        if id(main) in held and (gradient := getattr(main, name, None)) is not None and is_counted:
            yield parameter, gradient


def repair_loading(optimizer: MegatronOptimizer) -> None:
    """Work around two faults of Megatron-Core 0.16.1 in loading optimizer state.

    The distributed optimizer copies every entry of a parameter's state from the checkpoint and raises KeyError for
    missing entries, such as the ``step`` of torch's AdamW; such entries now keep their values. For SGD, the function
    that allocates the state before loading is missing.
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


def fuse_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam update all parameters of a GPU in few kernels, which count the steps on the GPU.

    Megatron-Core (0.16 to 0.19) falls back to torch's Adam without Transformer Engine and apex, with default settings.
    """
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups if isinstance(part.optimizer, torch.optim.Adam) else ():
            group["fused"] = {parameter.device.type for parameter in group["params"]} <= FUSED_DEVICES


def allocate_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Allocate the momentum buffers of SGD; zeros give the same first update as no buffers."""
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Allocate the state of torch's AdamW before the first step, as the distributed optimizer needs for saving."""
    for part in optimizer_parts(optimizer):
        if not isinstance(part, DistributedOptimizer) or not isinstance(part.optimizer, torch.optim.Adam):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device if group["fused"] else None)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def separate_adam_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter a separate ``step`` tensor after loading.

    Megatron-Core assigns one tensor to all parameters, which the next update would increment once per parameter.
    """
    for part in optimizer_parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
