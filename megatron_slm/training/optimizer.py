"""Build Megatron-Core's data-parallel wrapper, optimizer, and learning-rate and weight-decay schedule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_slm.config.core_fields import core_fields
from megatron_slm.config.schema import RunConfig
from megatron_slm.mcore.optimizer import fuse_torch_adam, repair_loading
from megatron_slm.model.gpt import DTYPES, model_config, virtual_stages
from megatron_slm.training.run_length import RunLength, ScheduleLength

STATE_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def wrap_data_parallel(chunks: Sequence[torch.nn.Module], config: RunConfig) -> list[torch.nn.Module]:
    """Wrap the chunks with gradient buffers that are summed (not averaged) over data-parallel ranks."""
    ddp_config = data_parallel_config(config)
    shared = model_config(list(chunks))
    return [
        DistributedDataParallel(shared, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def data_parallel_config(config: RunConfig) -> DistributedDataParallelConfig:
    """Return Megatron-Core's configuration of gradient and parameter buffers.

    As in Megatron-LM, the interleaved schedule starts overlapped parameter gathers, at the same time on all stages
    unless --no-align-param-gather is given; otherwise each stage starts them when it needs them.
    """
    parallel = config.parallel
    is_interleaved = virtual_stages(config.model, parallel) is not None
    aligned = parallel.overlap_param_gather and parallel.align_param_gather and is_interleaved
    given = core_fields("ddp", parallel, config.optimizer, config.precision)
    return DistributedDataParallelConfig(**given, align_param_gather=aligned)


def build_optimizer(chunks: Sequence[torch.nn.Module], config: RunConfig) -> MegatronOptimizer:
    """Build the optimizer of wrapped chunks, and configure how pipeline schedules finalize gradients."""
    parallel = config.parallel
    optimizer = get_megatron_optimizer(optimizer_config(config), list(chunks))
    repair_loading(optimizer)
    fuse_torch_adam(optimizer)
    schedule = model_config(list(chunks))
    schedule.finalize_model_grads_func = finalize_model_grads
    schedule.grad_scale_func = optimizer.scale_loss
    if parallel.overlap_grad_reduce:
        schedule.no_sync_func = _single_or_list([chunk.no_sync for chunk in chunks])
        if parallel.align_grad_reduce:
            schedule.grad_sync_func = _single_or_list([chunk.start_grad_sync for chunk in chunks])
    if data_parallel_config(config).align_param_gather:
        schedule.param_sync_func = _single_or_list([partial(start_missing_gathers, chunk) for chunk in chunks])
    return optimizer


def start_missing_gathers(chunk: torch.nn.Module, *_: Any) -> None:
    """Start the parameter gathers of a chunk that have not run since its gradients were reset.

    Megatron-Core's ``start_param_sync`` would gather all parameters again after a ranking pass, whose modules gather
    those that they use.
    """
    buckets: Any = chunk.bucket_groups + chunk.expert_parallel_bucket_groups  # type: ignore[operator]
    for bucket in buckets:
        if not bucket.param_gather_dispatched:
            bucket.start_param_sync()


def optimizer_config(config: RunConfig) -> MegatronOptimizerConfig:
    """Return Megatron-Core's optimizer configuration.

    It receives the FP8 recipe only if the model runs in FP8: with a recipe, the precision-aware optimizer expects main
    weights that Megatron-Core manages.
    """
    precision = config.precision
    dtypes = {name: DTYPES[getattr(precision, name)] for name in STATE_DTYPES}
    return MegatronOptimizerConfig(
        **core_fields("optimizer", config.optimizer, config.parallel, config.training, precision),
        **dtypes,
        fp8_recipe=precision.fp8_recipe if precision.fp8_format is not None else None,
        params_dtype=DTYPES[config.training.params_dtype],
    )


@torch.no_grad()
def gather_parameters(chunks: Sequence[torch.nn.Module]) -> None:
    """Gather the updated parameters on every rank; required before they are read outside the forward pass.

    With ``--overlap-param-gather``, a rank has only its shard of the updated parameters until the next forward pass
    gathers the others. Collective over the data-parallel ranks; no-op without overlap.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:  # type: ignore[union-attr]
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]


def _single_or_list(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def build_scheduler(optimizer: Any, config: RunConfig, length: RunLength) -> OptimizerParamScheduler:
    """Return the schedule of a run of ``length``, counted in samples as in Megatron-LM.

    Args:
        optimizer: an optimizer, or any object with ``param_groups``.
    """
    settings, phases = config.optimizer, ScheduleLength.from_config(config, length)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=phases.warmup,
        lr_decay_steps=phases.decay,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay if settings.start_weight_decay is None else settings.start_weight_decay,
        end_wd=settings.weight_decay if settings.end_weight_decay is None else settings.end_weight_decay,
        wd_incr_steps=phases.weight_decay,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=settings.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=settings.override_opt_param_scheduler,
        wsd_decay_steps=phases.wsd_decay,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


def set_schedule_length(scheduler: OptimizerParamScheduler, config: RunConfig, length: RunLength) -> None:
    """Set the phases of a resumed schedule, since the global batch size may have changed."""
    phases = ScheduleLength.from_config(config, length)
    scheduler.lr_warmup_steps, scheduler.lr_decay_steps = phases.warmup, phases.decay
    scheduler.wsd_decay_steps, scheduler.wd_incr_steps = phases.wsd_decay, phases.weight_decay
    scheduler.step(0)
