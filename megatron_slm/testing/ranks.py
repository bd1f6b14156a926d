"""Run a function on several processes as the ranks of one job, and return their results."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_slm.runtime import process
from megatron_slm.runtime.groups import Groups, ParallelLayout

PRELOAD = [
    "megatron_slm.mcore.import_core",  # before modules that import Megatron-Core
    "torch._dynamo",  # which torch's optimizers import
    "megatron_slm.training.setup",
    "megatron_slm.cli.pretrain",
    "megatron_slm.testing.tiny",
    "pytest",  # which modules of tests import
]


def fork_server() -> ForkServerContext:
    """Return the context of processes that are clean but have the imports of a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, initialize: bool = True, timeout: float = 180
) -> list[Any]:
    """Run ``function(rank, world_size, *args)`` on every rank over gloo; return the results in rank order.

    Args:
        function: module-level function, so that it can be pickled.
        initialize: create a process group first; otherwise only set the environment variables of torchrun.
        timeout: seconds after which running ranks are killed.

    Raises:
        AssertionError: a rank failed or hung; includes the traceback of the first failed rank.
    """
    with reserved_port() as port:
        return _run(fork_server(), function, world_size, port, initialize, args, timeout)


@contextmanager
def shared_process_group() -> Iterator[None]:
    """Let several runs of the trainer on the same ranks, in any layouts, share one process group.

    Joining the group again would need another port.
    """
    start, stop = process.start, process.stop

    def start_again(layout: ParallelLayout, *, timeout_minutes: float = 10, seed: int = 1234, **options: Any) -> Groups:
        if not dist.is_initialized():
            return start(layout, timeout_minutes=timeout_minutes, seed=seed, **options)
        return process.build_groups(layout, torch.device("cpu"), timeout_minutes=timeout_minutes, seed=seed)

    try:
        with mock.patch.multiple(process, start=start_again, stop=lambda: None):
            yield
    finally:
        stop()


def _run(
    context: ForkServerContext,
    function: Callable[..., Any],
    world_size: int,
    port: int,
    initialize: bool,
    args: tuple[Any, ...],
    timeout: float,
) -> list[Any]:
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, function, rank, world_size, port, initialize, args))
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
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(results))} did not respond in {timeout} s"
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                failure, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failure = "the process died without a result"
            assert failure is None, f"rank {rank} failed:\n{failure}"
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    initialize: bool,
    args: tuple[Any, ...],
) -> None:
    gc.freeze()  # collections do not visit, and thereby copy, the pages of imported modules
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        if initialize:
            dist.init_process_group("gloo")
        # pickle copies tensors; the pipe's pickler would share memory with a terminated process.
        pipe.send_bytes(pickle.dumps((None, function(rank, world_size, *args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a free port that the system gives to no other socket meanwhile; a server that names it can listen on it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield int(holder.getsockname()[1])
