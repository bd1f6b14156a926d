"""Checks of the GPUs of a node, or of its CPU, in a process of their own, since they may hang.

Run as ``python -m megatron_slm.runtime.node_check.device compute``, or with ``pair RANK WORLD_SIZE ADDRESS PORT``. The
last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

GEMM_SIZE = {"cuda": 8192, "cpu": 256}
GEMM_REPETITIONS = {"cuda": 50, "cpu": 5}
REDUCED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 20}
REDUCTIONS = 10
SECONDS_TO_MEET = 60.0


def compute() -> dict[str, Any]:
    """Check each GPU with a matrix product, and all together with an all-reduce."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", index) for index in range(gpus)] or [torch.device("cpu")]
    errors: list[str] = []
    rates = {"gemm": [_gemm(device, errors) for device in devices]}
    memory = []
    for device in devices[:gpus]:
        free, total = torch.cuda.mem_get_info(device)
        memory.append((free + torch.cuda.memory_reserved(device)) / total)
    if gpus > 1:
        rates["all-reduce in the node"] = [_reduce_in_node(devices, errors)]
    return {"gpus": gpus, "errors": errors, "rates": rates, "device_memory": memory}


def _gemm(device: torch.device, errors: list[str]) -> float:
    """Return the rate of a product in TFLOP/s; its values are small integers, so that the result is exact."""
    size, repetitions = GEMM_SIZE[device.type], GEMM_REPETITIONS[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = (torch.arange(size, device=device) % 3 - 1).to(dtype)
    columns = (torch.arange(size, device=device) % 5 - 2).to(dtype)
    left, right = rows[:, None].expand(size, size).contiguous(), columns[None, :].expand(size, size).contiguous()
    product = left @ right
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(repetitions):
        product = left @ right
    _synchronize(device)
    seconds = time.perf_counter() - begin
    expected = (rows.double()[:, None] * columns.double()[None, :] * size).to(dtype)
    wrong = int((product != expected).sum())
    if wrong:
        errors.append(f"{device}: {wrong} values of a matrix product are wrong")
    return 2 * size**3 * repetitions / seconds / 1e12


def _reduce_in_node(devices: list[torch.device], errors: list[str]) -> float:
    """Return the bandwidth of an all-reduce over the GPUs of this process in GB/s."""
    import torch.cuda.nccl as nccl

    count = REDUCED_BYTES["cuda"] // 4
    values = [torch.full((count,), float(index + 1), device=device) for index, device in enumerate(devices)]
    sums = [torch.empty_like(value) for value in values]
    nccl.all_reduce(values, sums)
    for device in devices:
        _synchronize(device)
    begin = time.perf_counter()
    for _ in range(REDUCTIONS):
        nccl.all_reduce(values, sums)
    for device in devices:
        _synchronize(device)
    seconds = time.perf_counter() - begin
    expected = len(devices) * (len(devices) + 1) / 2
    for device, total in zip(devices, sums, strict=True):
        if not bool((total == expected).all()):
            errors.append(f"{device}: the result of an all-reduce within the node is wrong")
    return count * 4 * REDUCTIONS / seconds / 1e9


def pair(rank: int, world_size: int, address: str, port: int) -> dict[str, Any]:
    """Return the bandwidth of an all-reduce over the GPUs of two nodes, one process for each."""
    has_gpu = torch.cuda.is_available()
    kind = "cuda" if has_gpu else "cpu"
    device = torch.device("cuda", rank % max(world_size // 2, 1)) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS_TO_MEET),
    )
    value = torch.full((REDUCED_BYTES[kind] // 4,), float(rank + 1), device=device)
    total = value.clone()
    dist.all_reduce(total)
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(REDUCTIONS):
        total = value.clone()
        dist.all_reduce(total)
    _synchronize(device)
    seconds = time.perf_counter() - begin
    errors = []
    if not bool((total == world_size * (world_size + 1) / 2).all()):
        errors.append(f"{device}: the result of an all-reduce between nodes is wrong")
    dist.destroy_process_group()
    return {"errors": errors, "rate": REDUCED_BYTES[kind] * REDUCTIONS / seconds / 1e9}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    if argv[0] == "compute":
        result = compute()
    else:
        rank, world_size, address, port = argv[1:]
        result = pair(int(rank), int(world_size), address, int(port))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
