"""Load a published model into model chunks of any layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from megatron_slm.checkpoint.huggingface.family import Weight
from megatron_slm.checkpoint.huggingface.registry import find_family
from megatron_slm.checkpoint.huggingface.shapes import unit_shape
from megatron_slm.checkpoint.huggingface.tensors import PublishedTensors
from megatron_slm.checkpoint.requests import loadable_model_state
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import ModelConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import build_run_tokenizer

if TYPE_CHECKING:
    from megatron_slm.checkpoint.huggingface.source import HuggingFaceSource

HEAD = "lm_head.weight"


class PublishedModel:
    """Represent an open published model, whose tensors are read in Megatron-Core's arrangement; a context manager.

    Raises:
        ConfigError: the model is unreadable, or its tensors are not those of its configuration.
    """

    def __init__(self, source: HuggingFaceSource) -> None:
        published = source.published()
        family = find_family(published)
        self.flag, self.directory = source.flag, source.directory
        self.model: ModelConfig = source.config().model
        self.weights = family.weights(self.model)
        self.tensors = PublishedTensors(source.directory, source.flag, family.prefix)
        self._dtypes: dict[str, torch.dtype] = {}  # by key of Megatron-Core
        self._check_size(source)
        ignored = family.ignored
        if not self.model.untie_embeddings_and_output_weights:
            ignored = (*ignored, rf"^{re.escape(HEAD)}$")  # a copy of the embedding
        units = ((weight, unit) for weight in self.weights for unit in weight.units(self.model))
        self.tensors.check_names([name for weight, unit in units for name in weight.published_names(unit)], ignored)

    def __enter__(self) -> PublishedModel:
        return self

    def __exit__(self, *details: Any) -> None:
        self.tensors.__exit__(*details)

    def read(self, weight: Weight, unit: tuple[int, ...]) -> Tensor:
        """Return one layer's or expert's tensor in Megatron-Core's arrangement, without vocabulary padding."""
        dtype = self._dtype(weight)
        return weight.layout.join([self.tensors.read(name).to(dtype) for name in weight.published_names(unit)])

    def describe(self, weight: Weight) -> Tensor:
        """Return a tensor without data, with the shape and dtype of one unit."""
        return torch.empty(unit_shape(weight.key, self.model), dtype=self._dtype(weight), device="meta")

    def check_shapes(self) -> None:
        """Validate the shapes and data types of all tensors.

        Raises:
            ConfigError: a tensor does not have the shape that config.json implies, or an unsupported data type.
        """
        for weight in self.weights:
            expected = [list(part.shape) for part in weight.layout.split(self.describe(weight))]
            for unit in weight.units(self.model):
                for name, shape in zip(weight.published_names(unit), expected, strict=True):
                    if (found := list(self.tensors.describe(name).shape)) != shape:
                        raise ConfigError(
                            f"{self.flag}: {self.directory}: {name} has the shape {found}, and config.json implies "
                            f"{shape}. Correct config.json, or download the model again."
                        )

    def _dtype(self, weight: Weight) -> torch.dtype:
        """Return the data type of all units: the narrowest that represents the published values exactly."""
        if weight.key not in self._dtypes:
            names = (name for unit in weight.units(self.model) for name in weight.published_names(unit))
            self._dtypes[weight.key] = reduce(
                torch.promote_types, {self.tensors.describe(name).dtype for name in names}
            )
        return self._dtypes[weight.key]

    def _check_size(self, source: HuggingFaceSource) -> None:
        """Raise ConfigError if the tokenizer has more entries than the model has rows.

        A damaged one is ignored: weights can be loaded with another tokenizer.
        """
        config = with_settings(source.config(), {"vocab_size": None})
        try:
            size = 0 if config.tokenizer.tokenizer_type is None else build_run_tokenizer(config).vocab_size
        except ConfigError:
            return
        rows = self.model.vocab_size or 0
        if size > rows:
            raise ConfigError(
                f"{self.flag}: the tokenizer in {self.directory} has ids up to {size - 1}, and the model has {rows} "
                f"embeddings. Resize the model (model.resize_token_embeddings({size}) in transformers), or remove the "
                "added tokens from the tokenizer."
            )


def check_tensors(source: HuggingFaceSource) -> None:
    """Validate the configuration, and the names, data types and shapes of all tensors. Not collective.

    Raises:
        ConfigError: a file or tensor is missing or damaged, or does not match the configuration.
    """
    with PublishedModel(source) as published:
        published.check_shapes()
        _check_head(published)


def _check_head(published: PublishedModel) -> None:
    """Raise ConfigError if a model with tied embeddings has another LM head."""
    tensors = published.tensors
    if published.model.untie_embeddings_and_output_weights or HEAD not in tensors.names():
        return
    [embedding] = (weight.names[0] for weight in published.weights if weight.is_vocabulary)
    if not torch.equal(tensors.read(HEAD), tensors.read(embedding)):
        raise ConfigError(
            f"{published.flag}: {published.directory}: {HEAD} differs from {embedding}, but tie_word_embeddings is "
            "true. Set it to false in config.json, or remove the tensor."
        )


@torch.no_grad()
def load_weights(source: HuggingFaceSource, chunks: Sequence[torch.nn.Module]) -> None:
    """Copy this rank's part of every tensor into the model chunks. Not collective.

    Raises:
        ConfigError: the model has other tensors or shapes.
    """
    _check_precision(chunks, source)
    with PublishedModel(source) as published:
        by_key = {key: weight for weight in published.weights for key in (weight.key, *weight.aliases)}
        current: tuple[Any, Tensor | None] = (None, None)
        for shard in _shards(loadable_model_state(chunks)):
            weight = _find(by_key, shard, source)
            unit = tuple(shard.global_offset[: shard.prepend_axis_num])
            if current[0] != (weight.key, unit):
                current = ((weight.key, unit), published.read(weight, unit))
            assert current[1] is not None
            _copy(current[1], shard, weight, source)


def _check_precision(chunks: Sequence[torch.nn.Module], source: HuggingFaceSource) -> None:
    """Raise ConfigError for weights in FP8, of which Megatron-Core's sharded state has copies instead of views."""
    if any(is_float8tensor(parameter) for chunk in chunks for parameter in chunk.parameters()):
        raise ConfigError(
            f"{source.flag}: a published model cannot be loaded into weights in FP8 (--reference-fp8 or "
            f"--fp8-param-gather). Convert {source.directory} with tools/convert_checkpoint.py first."
        )


def _shards(state: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    """Yield the sharded tensors of the model chunks, whose data are the parameters or views of them."""
    for chunk in state.values():
        for leaf in chunk.values():
            if isinstance(leaf, ShardedTensorFactory):
                yield from leaf.build()
            elif isinstance(leaf, ShardedTensor):
                yield leaf


def _find(by_key: Mapping[str, Weight], shard: ShardedTensor, source: HuggingFaceSource) -> Weight:
    if shard.key not in by_key:
        raise ConfigError(
            f"{source.flag}: {source.directory} has no weights for {shard.key} of this run's model. Leave out the "
            "model flag that adds it."
        )
    return by_key[shard.key]


def _copy(tensor: Tensor, shard: ShardedTensor, weight: Weight, source: HuggingFaceSource) -> None:
    """Copy the shard's window of ``tensor`` into its data; vocabulary rows beyond the tensor are zero."""
    axes = shard.prepend_axis_num
    shape = tuple(shard.global_shape[axes:])
    fits = tensor.shape[1:] == shape[1:] if weight.is_vocabulary else tuple(tensor.shape) == shape
    if not fits or (weight.is_vocabulary and tensor.shape[0] > shape[0]):
        raise ConfigError(
            f"{source.flag}: {', '.join(weight.names)} in {source.directory} form a tensor of shape "
            f"{list(tensor.shape)}, and this run's model has {list(shape)}. Leave out the model flags that differ."
        )
    offset, size = shard.global_offset[axes:], shard.local_shape
    window = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
    part, data = tensor[window], shard.data
    if weight.is_vocabulary:
        data.zero_()
        data = data[: part.shape[0]]
    data.copy_(part)
