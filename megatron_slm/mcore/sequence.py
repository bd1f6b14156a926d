"""Temporary models without sequence parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_slm.mcore.patching import replaced_attributes

ATTRIBUTES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def without_sequence_parallelism(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Disable sequence parallelism of the model chunks in the block, for sequences that TP does not divide.

    Megatron-Core's ``set_model_to_sequence_parallel`` (0.16.1 to 0.19.2) keeps references to every model it has seen.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    owners: list[Any] = [*configs.values(), *modules]
    enabled = [(owner, name, False) for owner in owners for name in ATTRIBUTES if getattr(owner, name, False) is True]
    with replaced_attributes(*enabled):
        yield
