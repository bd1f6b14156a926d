"""Runs a function on several processes as the ranks of one job, and brings their results back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = [
    "torch",
    "torch.distributed",
    "megatron_slm.training.setup",
    "megatron_slm.cli.pretrain",
    "megatron_slm.testing.ranks",
]


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, initialise: bool = True, timeout: float = 180
) -> list[Any]:
    """``function(rank, world_size, *args)`` on every rank, over gloo; the results in the order of ranks.

    Args:
        function: at the top level of a module, so that it can be sent to other processes.
        initialise: join a process group first; otherwise only the launcher's environment is set, as torchrun does.
        timeout: seconds after which ranks that still run are ended.

    Raises:
        AssertionError: a rank failed or hung; holds the traceback of the first that did.
    """
    context = multiprocessing.get_context("forkserver")  # imports are paid once, and every rank starts clean
    context.set_forkserver_preload(PRELOAD)
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, function, rank, world_size, port, initialise, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout)
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(results))} gave no answer in {timeout} s"
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                failure, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failure = "the process died without a word"
            assert failure is None, f"rank {rank} failed:\n{failure}"
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    initialise: bool,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        if initialise:
            dist.init_process_group("gloo")
        # Plain pickle copies tensors; a pipe of its own would share their memory with a process that is gone.
        pipe.send_bytes(pickle.dumps((None, function(rank, world_size, *args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
