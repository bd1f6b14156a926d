"""Starts and ends a process of a run: torch.distributed, Megatron's parallel state, seeds."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_slm.runtime.cpu import redirect_cuda_to_cpu
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import Groups, ParallelLayout


def launched_world_size(env: Mapping[str, str] = os.environ) -> int:
    """The number of processes that the launcher (torchrun, srun, or none) started."""
    return int(env.get("WORLD_SIZE") or env.get("SLURM_NTASKS") or 1)


def start(
    layout: ParallelLayout, *, backend: str | None = None, timeout_minutes: float = 10, seed: int = 1234
) -> Groups:
    """Join the process group, build Megatron's parallel groups and seed every random generator.

    Args:
        layout: sizes of the parallel dimensions.
        backend: "nccl" or "gloo"; None takes nccl where there is a GPU.
        timeout_minutes: after this long a collective that hangs ends the run.
        seed: of weights and dropout. It is offset by the pipeline stage, as in Megatron-LM.

    Raises:
        ConfigError: the number of processes is not a multiple of TP x PP x CP.
    """
    device = _choose_device(backend)
    _join(backend or ("nccl" if device.type == "cuda" else "gloo"), timedelta(minutes=timeout_minutes))
    world_size = dist.get_world_size()
    if world_size % (layout.tensor * layout.pipeline * layout.context):
        stop()
        raise ConfigError(
            f"{world_size} processes were started, which is not a multiple of --tensor-model-parallel-size "
            f"{layout.tensor} x --pipeline-model-parallel-size {layout.pipeline} x --context-parallel-size "
            f"{layout.context}. "
            "Start a multiple of their product."
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    groups = Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model=parallel_state.get_model_parallel_group(),
        device=device,
        rank=dist.get_rank(),
        world_size=world_size,
    )
    seed_everything(seed + 100 * groups.pp_rank)
    return groups


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's tensor-parallel random states."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave torch's and Megatron's random states as they were before the block."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    tracker.set_states(states)


def stop() -> None:
    """Leave all process groups; a process that skips this can die at exit with a C++ abort."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _choose_device(backend: str | None) -> torch.device:
    if backend == "nccl" and not torch.cuda.is_available():
        raise ConfigError("--distributed-backend nccl needs a GPU, and torch sees none. Use gloo, or leave it out.")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    redirect_cuda_to_cpu()
    return torch.device("cpu")


def _join(backend: str, timeout: timedelta) -> None:
    env = os.environ
    if env.get("RANK"):
        dist.init_process_group(backend, timeout=timeout)
    elif int(env.get("SLURM_NTASKS", 1)) > 1 and env.get("MASTER_ADDR"):
        dist.init_process_group(
            backend,
            init_method=f"tcp://{env['MASTER_ADDR']}:{env.get('MASTER_PORT', '29500')}",
            rank=int(env["SLURM_PROCID"]),
            world_size=int(env["SLURM_NTASKS"]),
            timeout=timeout,
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
