"""Mapping of settings to the fields of Megatron-Core's configurations.

``flag(..., core="model.layernorm_epsilon")`` passes a setting to the field ``layernorm_epsilon`` of the target "model".
Without a field name, the setting's name is used. Several targets are separated by spaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

TARGETS = ("model", "optimizer", "ddp")  # TransformerConfig, OptimizerConfig, DistributedDataParallelConfig


def core_fields(target: str, *groups: Any) -> dict[str, Any]:
    """Return the fields of one Megatron-Core configuration that the settings of ``groups`` provide.

    Args:
        target: one of TARGETS.
        groups: dataclasses of :mod:`megatron_slm.config.schema`.
    """
    return {
        name: getattr(group, setting.name)
        for group in groups
        for setting in fields(group)
        for to, name in _destinations(setting)
        if to == target
    }


def _destinations(setting: Field[Any]) -> Iterator[tuple[str, str]]:
    for destination in setting.metadata["core"].split():
        target, _, name = destination.partition(".")
        yield target, name or setting.name
