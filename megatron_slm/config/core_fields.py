"""Settings that go to Megatron-Core as they are: the fields of its configurations are named at the settings.

``flag(..., core="model.layernorm_epsilon")`` gives a setting to the field ``layernorm_epsilon`` of the target "model".
Without a field the name is the setting's; several targets are separated by spaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

TARGETS = ("model", "optimizer", "ddp")  # TransformerConfig, OptimizerConfig, DistributedDataParallelConfig


def core_fields(target: str, *groups: Any) -> dict[str, Any]:
    """Return the fields of one of Megatron-Core's configurations that the settings of ``groups`` give.

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
