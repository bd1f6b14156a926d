"""Random states of a run that starts: which ranks share them."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_slm.cli import pretrain
from megatron_slm.config.flags import parse
from megatron_slm.runtime import process
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import ParallelLayout
from megatron_slm.runtime.kernel_order import order_kernels
from megatron_slm.runtime.launch import Launch
from megatron_slm.testing.ranks import run_ranks


def _first_random_numbers(rank: int, world_size: int, layout: ParallelLayout) -> tuple[float, float]:
    process.start(layout)
    try:
        shared = torch.rand(1).item()
        with get_cuda_rng_tracker().fork():
            return shared, torch.rand(1).item()
    finally:
        process.stop()


@pytest.mark.parametrize(
    ("layout", "numbers"),
    [
        (ParallelLayout(), (1, 1)),
        (ParallelLayout(tensor=2), (1, 2)),
        (ParallelLayout(pipeline=2), (2, 2)),
    ],
    ids=["data", "tensor", "pipeline"],
)
def test_random_states_differ_between_stages_and_tensor_parallel_ranks(
    layout: ParallelLayout, numbers: tuple[int, int]
) -> None:
    """Data-parallel ranks begin with the same weights, and pipeline stages with different ones."""
    drawn = run_ranks(_first_random_numbers, 2, layout, initialize=False)
    assert tuple(len(set(column)) for column in zip(*drawn, strict=True)) == numbers


@pytest.mark.parametrize(
    ("layout", "given", "expected"),
    [
        (ParallelLayout(), None, None),
        (ParallelLayout(pipeline=2), None, None),
        (ParallelLayout(tensor=2), None, "1"),
        (ParallelLayout(context=2), None, "1"),
        (ParallelLayout(tensor=2), "", "1"),
        (ParallelLayout(tensor=2), "32", "32"),
    ],
)
def test_kernels_are_ordered_for_tensor_and_context_parallelism(
    monkeypatch: pytest.MonkeyPatch, layout: ParallelLayout, given: str | None, expected: str | None
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    order_kernels(layout.tensor, layout.context)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


def test_kernels_are_ordered_before_the_driver_is_initialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question for a GPU initializes it, and thus reads the environment."""

    def is_available() -> bool:
        raise LookupError(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    config = parse(["--num-layers", "2", "--lr", "1", "--tensor-model-parallel-size", "2"]).config
    with pytest.raises(LookupError, match="1"):
        pretrain._train(config, "", None)


@pytest.mark.parametrize(
    ("layout", "given", "capability", "device", "is_refused"),
    [
        (ParallelLayout(tensor=2), "32", (9, 0), "cuda", True),
        (ParallelLayout(context=2), "0", (8, 0), "cuda", True),
        (ParallelLayout(tensor=2), "32", (10, 0), "cuda", False),
        (ParallelLayout(tensor=2), "1", (9, 0), "cuda", False),
        (ParallelLayout(tensor=2), "", (9, 0), "cuda", False),  # a dry run, whose ranks would set it
        (ParallelLayout(tensor=2), "32", (9, 0), "cpu", False),
        (ParallelLayout(pipeline=2), "32", (9, 0), "cuda", False),
    ],
)
def test_queues_that_lose_the_order_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    layout: ParallelLayout,
    given: str,
    capability: tuple[int, int],
    device: str,
    is_refused: bool,
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    refusal = pytest.raises(ConfigError, match="Unset CUDA_DEVICE_MAX_CONNECTIONS, or set it to 1")
    with refusal if is_refused else nullcontext():
        process.check_kernel_order(layout, torch.device(device))


@pytest.mark.parametrize(
    ("launch", "devices", "torchrun", "expected"),
    [
        (Launch("srun", 7, 8, 3), 1, False, 0),  # --gpus-per-task 1 or --gpu-bind single
        (Launch("torchrun", 7, 8, 3), 1, False, 0),  # a launcher that sets RANK and binds a GPU to each process
        (Launch("srun", 7, 8, 3), 4, False, 3),
        (Launch("torchrun", 7, 8, 3), 4, True, 3),
        (Launch("torchrun", 7, 8, 3), 1, True, None),
        (Launch("srun", 7, 8, 3), 2, False, None),
        (Launch("none"), 1, False, 0),
    ],
)
def test_gpu_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, launch: Launch, devices: int, torchrun: bool, expected: int | None
) -> None:
    monkeypatch.setattr(process, "is_under_torchrun", lambda: torchrun)
    if expected is not None:
        assert process._device_index(launch, devices) == expected
        return
    with pytest.raises(ConfigError, match=f"local rank 3, and {devices} GPUs are visible"):
        process._device_index(launch, devices)


@pytest.mark.parametrize(("devices", "refused"), [("abc", 0), ("aba", 3)])
def test_ranks_that_share_a_gpu_are_refused(devices: str, refused: int) -> None:
    store = dist.HashStore()

    def claim(rank: int) -> str:
        try:
            process.claim_device(store, Launch("srun", rank, len(devices), rank), devices[rank])
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(devices)) as pool:
        errors = list(filter(None, pool.map(claim, range(len(devices)))))
    assert len(errors) == refused
    assert all("uses the same GPU as another rank. Start one process per GPU" in error for error in errors)


@pytest.mark.parametrize(("served_by", "rank"), [("17", 1), ("18", 1), ("18", 0)])
def test_rank_that_meets_another_job_is_refused_at_once(
    served_by: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ports follow from job ids, so two jobs on a node may have the same; a rank would wait for its peers there."""
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    store = dist.HashStore()
    store.set("job", served_by)
    refused = pytest.raises(ConfigError, match="rank 1 of job 18 is connected to job 17, which uses node0:4711 also")
    with refused if served_by == "17" else nullcontext():
        process._check_server(store, Launch("srun", rank, 2, 0, "node0", 4711))
    assert store.get("job").decode() == served_by


def test_occupied_port_is_reported() -> None:
    """As if two jobs on one node had the same port; without a wait for ranks which cannot come."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        launch = Launch("srun", 0, 2, 0, "127.0.0.1", other.getsockname()[1])
        with pytest.raises(ConfigError, match=r"another process .* uses the port\. Set MASTER_PORT to a free port"):
            process._join(launch, "gloo", torch.device("cpu"), timedelta(minutes=10))


@pytest.mark.parametrize(
    ("backend", "has_gpu", "problem"),
    [("nccl", False, "needs a GPU"), ("gloo", True, "CUDA_VISIBLE_DEVICES"), ("gloo", False, None), (None, True, None)],
)
def test_backends_fit_the_device(backend: str | None, has_gpu: bool, problem: str | None) -> None:
    with pytest.raises(ConfigError, match=problem) if problem else nullcontext():
        process.check_backend(backend, has_gpu=has_gpu)
