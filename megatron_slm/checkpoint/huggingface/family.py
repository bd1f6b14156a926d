"""Description of a model family: its ``config.json`` and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.layouts import Layout, Same
from megatron_slm.config.activation import activation_name
from megatron_slm.config.schema import ModelConfig

LAYER, EXPERT = "{layer}", "{expert}"  # placeholders in names


@dataclass(frozen=True)
class Weight:
    """Represent one tensor of Megatron-Core, with leading axes for layers and experts, and the published tensors.

    Attributes:
        key: Megatron-Core's global key; other layer implementations may use one of ``aliases``.
        names: published names with the placeholders {layer} and {expert}.
        is_vocabulary: the first axis is the vocabulary, which is padded in Megatron-Core.
    """

    key: str
    names: tuple[str, ...]
    layout: Layout = Same()
    is_vocabulary: bool = False
    aliases: tuple[str, ...] = ()

    def axes(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the sizes of the leading axes: layers, experts, both or none."""
        sizes = []
        if LAYER in self.names[0]:
            sizes.append(model.num_layers)
        if EXPERT in self.names[0]:
            sizes.append(model.num_experts or 0)
        return tuple(sizes)

    def units(self, model: ModelConfig) -> Iterator[tuple[int, ...]]:
        """Yield the indices of all entries on the leading axes."""
        yield from product(*map(range, self.axes(model)))

    def published_names(self, unit: tuple[int, ...]) -> list[str]:
        """Return the names of the published tensors of one unit."""
        index = iter(unit)
        values = {name.strip("{}"): next(index) for name in (LAYER, EXPERT) if name in self.names[0]}
        return [name.format(**values) for name in self.names]


@dataclass(frozen=True)
class Family:
    """Represent one architecture of the transformers library."""

    model_type: str  # of config.json
    architecture: str  # class in the transformers library
    read_settings: Callable[[PublishedConfig], dict[str, Any]]  # settings of a published model, by name
    write_fields: Callable[[ModelConfig], dict[str, Any]]  # fields of config.json; the vocabulary is added
    weights: Callable[[ModelConfig], list[Weight]]
    prefix: str = "model."  # of the tensors of the base model, whose checkpoints lack it
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)  # patterns of tensors that the architecture recomputes


def published_activation(model: ModelConfig, names: Mapping[str, str]) -> str:
    """Return the published name of the model's activation; of several names for one setting, the first.

    Args:
        names: setting by published name, as for :meth:`PublishedConfig.choice`.
    """
    activation = activation_name(model)
    return next((name for name, setting in names.items() if setting == activation), activation)
