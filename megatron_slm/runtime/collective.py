"""Collective decisions, which keep a failed check on one rank from blocking the others, and reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.runtime.errors import ConfigError

T = TypeVar("T")


def is_first_rank() -> bool:
    """Return whether this is rank 0 or a process without a process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0; every rank returns its result, or raises an equal ConfigError. Collective.

    Without a process group, the function runs in this process.
    """
    if not dist.is_initialized():
        return function()
    verdict: list[Any] = [None, None]
    if is_first_rank():
        try:
            verdict[0] = function()
        except ConfigError as error:
            verdict[1] = (type(error), str(error))
    dist.broadcast_object_list(verdict, 0)
    if verdict[1] is not None:
        kind, message = verdict[1]
        raise kind(message)
    return verdict[0]


def on_every_rank(function: Callable[[], T]) -> T:
    """Run ``function`` on every rank and return its result; if one rank raises ConfigError, all do. Collective.

    Use it for files that every rank reads, which may be missing or unreadable on some hosts only.
    """
    if not dist.is_initialized():
        return function()
    result, error = None, None
    try:
        result = function()
    except ConfigError as caught:
        error = caught
    for rank, failure in enumerate(gather_on_every_rank(None if error is None else (type(error), str(error)))):
        if failure is not None:
            kind, message = failure
            raise kind(f"rank {rank}: {message}" if rank else message) from error
    return cast(T, result)


def gather_on_every_rank(value: T) -> list[T]:
    """Return the ``value`` of every rank, by rank. Collective."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_on_first_rank(value: T) -> list[T]:
    """Return every rank's ``value`` on rank 0, and an empty list elsewhere. Collective."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if is_first_rank() else None
    dist.gather_object(value, gathered, 0)
    return gathered or []


def group_size(group: ProcessGroup | None) -> int:
    """Return the number of ranks of a group; None is a group of one rank."""
    return 1 if group is None else group.size()


def group_rank(group: ProcessGroup | None) -> int:
    """Return the rank of this process in a group; None is a group of one rank."""
    return 0 if group is None else group.rank()


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum ``values`` over ``group``, in place; None is a group of one rank."""
    if group_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def all_reduce_max(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Replace ``values`` by their maximum over ``group``, in place; None is a group of one rank."""
    if group_size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def broadcast_from_last_stage(values: Tensor, pipeline: ProcessGroup | None) -> Tensor:
    """Broadcast ``values`` from the last rank of a pipeline, in place; None is a pipeline of one rank."""
    if pipeline is not None and pipeline.size() > 1:
        dist.broadcast(values, dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
    return values
