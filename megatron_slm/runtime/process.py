"""Start-up and shutdown of a rank: torch.distributed, Megatron-Core's parallel state, seeds."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_slm.mcore.cpu import redirect_cuda_to_cpu
from megatron_slm.runtime import reporting
from megatron_slm.runtime.addresses import resolve_host
from megatron_slm.runtime.collective import on_every_rank
from megatron_slm.runtime.early_reports import is_under_torchrun
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import Groups, ParallelLayout
from megatron_slm.runtime.health.session import start_health
from megatron_slm.runtime.kernel_order import CONNECTIONS, needs_kernel_order, order_kernels
from megatron_slm.runtime.launch import Launch, read_launch, slurm_job

SECONDS_BEFORE_NOTICE = 15.0  # of waiting for the other ranks
BLACKWELL = (10, 0)  # compute capability


def start(
    layout: ParallelLayout,
    *,
    backend: str | None = None,
    timeout_minutes: float = 10,
    seed: int = 1234,
    hang_timeout: float | None = None,
) -> Groups:
    """Join the process group, build Megatron-Core's parallel groups and seed all random generators.

    Args:
        layout: sizes of the parallel dimensions.
        backend: "nccl" or "gloo"; None selects nccl if there is a GPU.
        timeout_minutes: timeout of collective operations.
        seed: seed of weights and dropout, offset by the pipeline stage as in Megatron-LM.
        hang_timeout: seconds without progress after which a rank counts as hung, 0 for never; None disables the
            monitoring of the ranks.

    Raises:
        ConfigError: the number of processes is not a multiple of TP x PP x CP, or of TP x PP x EP, or the GPUs would
            not start kernels in order.
    """
    launch = read_launch()
    if launch.address is not None and not is_under_torchrun():
        launch = replace(launch, address=resolve_host(launch.address))
    order_kernels(layout.tensor, layout.context)
    device = _choose_device(backend, launch)
    timeout = timedelta(minutes=timeout_minutes)
    store = _join(launch, backend or ("nccl" if device.type == "cuda" else "gloo"), device, timeout)
    try:
        _check_processes(layout, dist.get_world_size())
        if device.type == "cuda":
            on_every_rank(lambda: check_kernel_order(layout, device))
    except ConfigError:
        stop()
        raise
    groups = build_groups(layout, device, timeout_minutes=timeout_minutes, seed=seed)
    if store is not None and hang_timeout is not None:
        start_health(
            dist.PrefixStore("health", store),
            launch,
            hang_timeout=hang_timeout,
            collective_timeout=timeout.total_seconds(),
            stage=groups.pp_rank,
        )
    return groups


def _check_processes(layout: ParallelLayout, world_size: int) -> None:
    for flag, size in (("context", layout.context), ("expert-model", layout.expert)):
        if world_size % (layout.tensor * layout.pipeline * size):
            raise ConfigError(
                f"{world_size} processes were started, which is not a multiple of --tensor-model-parallel-size "
                f"{layout.tensor} x --pipeline-model-parallel-size {layout.pipeline} x --{flag}-parallel-size "
                f"{size}. Start a multiple of their product."
            )


def build_groups(layout: ParallelLayout, device: torch.device, *, timeout_minutes: float, seed: int) -> Groups:
    """Build Megatron-Core's parallel groups, in place of existing ones, and seed all random generators."""
    if parallel_state.model_parallel_is_initialized():
        _destroy_parallel_groups()
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
        world_size=dist.get_world_size(),
    )
    seed_everything(seed + 100 * groups.pp_rank)
    return groups


def _destroy_parallel_groups() -> None:
    """Destroy all process groups but that of all ranks: a run has about thirty, each with threads over gloo."""
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron-Core's tensor-parallel random states."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore torch's and Megatron-Core's random states after the block."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    tracker.set_states(states)


def stop() -> None:
    """Destroy all process groups; without this, a process may abort at exit."""
    reporting.share_reports(None)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_kernel_order(layout: ParallelLayout, device: torch.device) -> None:
    """Validate the user's number of hardware queues, as Megatron-LM does for GPUs before Blackwell.

    Raises:
        ConfigError: the queues would not start kernels in the order of their launch.
    """
    given = os.environ.get(CONNECTIONS)
    if not given or given == "1" or device.type != "cuda" or not needs_kernel_order(layout.tensor, layout.context):
        return
    if torch.cuda.get_device_capability(device) < BLACKWELL:
        raise ConfigError(
            f"the environment variable {CONNECTIONS} is {given!r}. With --tensor-model-parallel-size or "
            "--context-parallel-size above 1, GPUs before Blackwell need 1, with which communication starts before the "
            f"matrix products that hide it. Unset {CONNECTIONS}, or set it to 1."
        )


def check_backend(backend: str | None, *, has_gpu: bool) -> None:
    """Raise ConfigError if the communication backend does not support the device of a run."""
    if backend == "nccl" and not has_gpu:
        raise ConfigError("--distributed-backend nccl needs a GPU, and torch sees none. Use gloo, or leave it out.")
    if backend == "gloo" and has_gpu:
        raise ConfigError(
            "--distributed-backend gloo is for CPUs (it does not send tensors of a GPU between pipeline stages), and "
            "torch sees a GPU. Leave the flag out, or hide the GPUs: set CUDA_VISIBLE_DEVICES to an empty value."
        )


def _choose_device(backend: str | None, launch: Launch) -> torch.device:
    check_backend(backend, has_gpu=torch.cuda.is_available())
    if torch.cuda.is_available():
        device = _device_index(launch, torch.cuda.device_count())
        torch.cuda.set_device(device)
        return torch.device("cuda", device)
    redirect_cuda_to_cpu()
    return torch.device("cpu")


def _device_index(launch: Launch, devices: int) -> int:
    """Return the index of this rank's GPU.

    Launchers that bind a GPU to each process, such as ``srun --gpus-per-task 1``, make only that one visible to it;
    torchrun does not, and its processes would share a visible GPU.
    """
    if devices == 1 and not is_under_torchrun():
        return 0
    if launch.local_rank >= devices:
        raise ConfigError(
            f"rank {launch.rank} has local rank {launch.local_rank}, and {devices} GPUs "
            "are visible. Start one process per GPU (torchrun --nproc-per-node), or check CUDA_VISIBLE_DEVICES."
        )
    return launch.local_rank


def _join(launch: Launch, backend: str, device: torch.device, timeout: timedelta) -> dist.Store | None:
    """Join the rendezvous and start the process group; return the store of all ranks, or None for a single process.

    Raises:
        ConfigError: the rendezvous failed, with the address and the timeout; or two ranks would use one GPU.
    """
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return None
    try:
        with _notice_while_waiting(launch):
            store = _rendezvous(launch, timeout)
            if launch.launcher == "srun" and "SLURM_HET_SIZE" not in os.environ:  # whose parts have their own job ids
                _check_server(store, launch)
            if device.type == "cuda":
                claim_device(store, launch, str(torch.cuda.get_device_properties(device).uuid))
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timeout,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(_not_joined(launch, timeout, error)) from error
    reporting.share_reports(dist.PrefixStore("reports", store))
    return store


def _rendezvous(launch: Launch, timeout: timedelta) -> dist.Store:
    """Return the key-value store of all ranks, served by torchrun's agent or rank 0."""
    url = "env://" if is_under_torchrun() else f"tcp://{launch.address}:{launch.port}"
    return next(dist.rendezvous(url, launch.rank, launch.world_size, timeout=timeout))[0]


def _check_server(store: dist.Store, launch: Launch) -> None:
    """Raise ConfigError if rank 0 of another job serves the address, whose ranks would wait for those of this job."""
    if launch.rank == 0:
        store.set("job", slurm_job().job_id)
        return
    store.wait(["job"])  # rank 0 sets it when all ranks are connected
    found, job = store.get("job").decode(), slurm_job().job_id
    if found != job:
        raise ConfigError(
            f"rank {launch.rank} of job {job} is connected to job {found}, which uses {launch.address}:{launch.port} "
            "also. Set MASTER_PORT to a free port for all ranks."
        )


def claim_device(store: dist.Store, launch: Launch, device: str) -> None:
    """Validate that no other rank uses the GPU of this rank, which NCCL would report late. Collective over all ranks.

    Args:
        store: key-value store of all ranks.
        launch: rank of this process.
        device: unique name of its GPU.

    Raises:
        ConfigError: two ranks use one GPU; on every rank.
    """
    claims = dist.PrefixStore("devices", store)
    if claims.add(f"GPU {device}", 1) > 1:
        claims.set("shared", f"rank {launch.rank} on {socket.gethostname()}")
    if claims.add("ranks", 1) == launch.world_size:
        claims.set("complete", "")
    claims.wait(["complete"])
    if not claims.check(["shared"]):
        return
    shared = claims.get("shared").decode()
    if claims.add("readers", 1) == launch.world_size:
        claims.set("read", "")
    if launch.rank == 0:  # it may serve the store
        claims.wait(["read"])
    raise ConfigError(
        f"{shared} uses the same GPU as another rank. Start one process per GPU: torchrun --nproc-per-node, or srun "
        "--ntasks-per-node with --gpus-per-task 1; and check LOCAL_RANK and CUDA_VISIBLE_DEVICES."
    )


def _not_joined(launch: Launch, timeout: timedelta, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "EADDRINUSE" in reason:
        return (
            f"rank {launch.rank} cannot serve the other ranks at {launch.address}:{launch.port}: another process on "
            f"{socket.gethostname()} uses the port. Set MASTER_PORT to a free port for all ranks."
        )
    return (
        f"the {launch.world_size} ranks did not meet at {launch.address}:{launch.port} within "
        f"{timeout.total_seconds() / 60:g} minutes ({reason}). Check that all {launch.world_size} processes were "
        "started, and that MASTER_ADDR and MASTER_PORT name the host of rank 0 and a free port."
    )


@contextmanager
def _notice_while_waiting(launch: Launch) -> Iterator[None]:
    """Print a note on rank 0 if the other ranks are late."""
    text = f"waiting for {launch.world_size} ranks at {launch.address}:{launch.port} ({launch.launcher})"
    timer = threading.Timer(SECONDS_BEFORE_NOTICE, reporting.print_error, [text])
    timer.daemon = True
    if launch.rank == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
