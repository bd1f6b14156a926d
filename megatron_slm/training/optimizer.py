"""Data-parallel wrapping, the optimizer and the schedule of learning rate and weight decay, all Megatron-Core's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_slm.config.core_fields import core_fields
from megatron_slm.config.schema import Config
from megatron_slm.model.gpt import model_config
from megatron_slm.training.run_length import RunLength, ScheduleLength


def wrap_data_parallel(chunks: Sequence[torch.nn.Module], config: Config) -> list[torch.nn.Module]:
    """The chunks with gradient buffers that are summed (not averaged) over data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(**core_fields("ddp", config.parallel, config.optimizer))
    shared = model_config(list(chunks))
    return [
        DistributedDataParallel(shared, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(chunks: Sequence[torch.nn.Module], config: Config) -> MegatronOptimizer:
    """The optimizer of wrapped chunks; also tells the pipeline schedules how to finish gradients."""
    parallel = config.parallel
    given = core_fields("optimizer", config.optimizer, parallel, config.training)
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    optimizer = get_megatron_optimizer(MegatronOptimizerConfig(**given, params_dtype=dtype), list(chunks))
    _repair_loading(optimizer)
    schedule = model_config(list(chunks))
    schedule.finalize_model_grads_func = finalize_model_grads
    schedule.grad_scale_func = optimizer.scale_loss
    if parallel.overlap_grad_reduce:
        schedule.no_sync_func = _single_or_list([chunk.no_sync for chunk in chunks])
    if parallel.overlap_param_gather:
        schedule.param_sync_func = _single_or_list([chunk.start_param_sync for chunk in chunks])
    return optimizer


@torch.no_grad()
def gather_parameters(chunks: Sequence[torch.nn.Module]) -> None:
    """Make every rank's parameters those of the last update; needed before they are read outside the forward pass.

    With ``--overlap-param-gather`` an update leaves each rank with its shard of the new values only, and the next
    forward pass gathers the rest. Collective over the data-parallel ranks; without overlap there is nothing to do.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:  # type: ignore[union-attr]
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]


def _single_or_list(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def build_scheduler(optimizer: MegatronOptimizer, config: Config, length: RunLength) -> OptimizerParamScheduler:
    """Return the schedule of a run of ``length``, counted in samples as Megatron-LM counts it."""
    own, phases = config.optimizer, ScheduleLength.of(config, length)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=own.lr_warmup_init,
        max_lr=own.lr,
        min_lr=own.min_lr,
        lr_warmup_steps=phases.warmup,
        lr_decay_steps=phases.decay,
        lr_decay_style=own.lr_decay_style,
        start_wd=own.weight_decay if own.start_weight_decay is None else own.start_weight_decay,
        end_wd=own.weight_decay if own.end_weight_decay is None else own.end_weight_decay,
        wd_incr_steps=phases.weight_decay,
        wd_incr_style=own.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=own.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=own.override_opt_param_scheduler,
        wsd_decay_steps=phases.wsd_decay,
        lr_wsd_decay_style=own.lr_wsd_decay_style,
    )


def set_schedule_length(scheduler: OptimizerParamScheduler, config: Config, length: RunLength) -> None:
    """Give a resumed schedule the phases of a run whose global batch has changed."""
    phases = ScheduleLength.of(config, length)
    scheduler.lr_warmup_steps, scheduler.lr_decay_steps = phases.warmup, phases.decay
    scheduler.wsd_decay_steps, scheduler.wd_incr_steps = phases.wsd_decay, phases.weight_decay
    scheduler.step(0)


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers that Megatron-Core has chained, or the one that it made."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _repair_loading(optimizer: MegatronOptimizer) -> None:
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
