"""Decisions of one rank that all ranks follow, so that a check on one rank leaves no other rank waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_slm.runtime.errors import ConfigError

T = TypeVar("T")


def is_first_rank() -> bool:
    """Return whether this is rank 0, or there is no process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0; every rank returns its result, or raises its ConfigError. Collective.

    Without a process group the function runs in place.
    """
    if not dist.is_initialized():
        return function()
    verdict: list[Any] = [None, None]
    if is_first_rank():
        try:
            verdict[0] = function()
        except ConfigError as error:
            verdict[1] = str(error)
    dist.broadcast_object_list(verdict, 0)
    if verdict[1] is not None:
        raise ConfigError(verdict[1])
    return verdict[0]


def gather_on_first_rank(value: T) -> list[T]:
    """Return every rank's ``value`` on rank 0, and an empty list elsewhere. Collective."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if is_first_rank() else None
    dist.gather_object(value, gathered, 0)
    return gathered or []
