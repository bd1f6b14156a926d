"""Match the sharded state of a model with the tensors of a checkpoint.

Megatron-Core names the same weight differently in some layer implementations and versions: layer norms beside or inside
the following linear layer, layers in one stacked tensor or one tensor each, and a prefix in NeMo's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_slm.model.hidden_states import LMHead
from megatron_slm.runtime.collective import gather_on_every_rank, on_every_rank
from megatron_slm.runtime.errors import ConfigError

EXTRA_STATE = "_extra_state"
Shapes = Mapping[str, tuple[int, ...] | None]  # by key; None for objects

# Names of the same layer norm inside the following linear layer (Transformer Engine) and before it.
NORMS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
EMBEDDINGS = "embedding.word_embeddings.weight"
MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")  # parts without which a model differs; MTP heads may be left
SHOWN = 6  # differences in one message


def model_state(chunks: Sequence[torch.nn.Module], **metadata: Any) -> dict[str, Any]:
    """Return Megatron-Core's sharded state of all model chunks, with global keys that any layout can read.

    Args:
        metadata: variants of the format, by Megatron-Core's names.
    """
    options = ensure_metadata_has_dp_cp_group(metadata or None)
    states = (chunk.sharded_state_dict(metadata=options) for chunk in chunks)  # type: ignore[operator]
    return {f"model{index}": state for index, state in enumerate(states)}


def loadable_model_state(chunks: Sequence[torch.nn.Module], **metadata: Any) -> dict[str, Any]:
    """Return the sharded state to load, without Transformer Engine's ``_extra_state``.

    The two layer implementations differ in these entries. They are empty without FP8, and Transformer Engine would
    unpickle them.
    """
    return {
        chunk: {key: value for key, value in state.items() if not key.endswith(EXTRA_STATE)}
        for chunk, state in model_state(chunks, **metadata).items()
    }


def weight_request(chunks: Sequence[torch.nn.Module], saved: Shapes) -> dict[str, Any]:
    """Return the sharded state to request from a checkpoint, under its names; Megatron-Core consumes it on loading."""
    prefix = weight_prefix(saved)
    return {
        chunk: {
            key: _renamed(leaf, saved, prefix) if isinstance(leaf, ShardedTensor | ShardedTensorFactory) else leaf
            for key, leaf in entries.items()
        }
        for chunk, entries in loadable_model_state(chunks, **_variant(saved)).items()
    }


def check_weights(chunks: Sequence[torch.nn.Module], saved: Shapes, directory: Path, flag: str) -> None:
    """Validate that the checkpoint contains exactly the weights of the model chunks. Collective over all ranks.

    Raises:
        ConfigError: weights are missing, superfluous or of other sizes; on every rank.
    """
    requested = {tensor.key: tensor for tensor in sharded_tensors(weight_request(chunks, saved))}
    heads = (module for chunk in chunks for module in chunk.modules() if isinstance(module, LMHead))
    rows = max((head.settings.vocab_size or 0 for head in heads), default=0)
    keys = set().union(*gather_on_every_rank(set(requested)))

    def compare() -> None:
        found = [problem for tensor in requested.values() if (problem := _difference(tensor, saved, rows))]
        prefix = weight_prefix(saved)
        parts = tuple(prefix + part for part in MODEL_PARTS)
        named = (key for key, shape in saved.items() if shape and key.startswith(parts))
        superfluous = sorted(key for key in named if keys.isdisjoint(weight_names(key)))
        found += [f"{key} {_size(saved[key])} is not in the model" for key in superfluous]
        if found:
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ConfigError(
                f"{flag}: the weights in {directory} do not fit the model: {'; '.join(sorted(found)[:SHOWN])}{more}. "
                "Compare the model flags with those of the checkpoint, or add --use-checkpoint-args."
            )

    on_every_rank(compare)


def _variant(saved: Shapes) -> dict[str, Any]:
    """Return Megatron-Core's names of the format variants that the checkpoint uses."""
    found = {}
    if any("decoder.layers.0." in key for key in saved):
        found["non_homogeneous_layers"] = True
    if any(key.endswith(("linear_fc1.weight_w", "linear_fc1.weight_v")) for key in saved):
        found["singleton_local_shards"] = True
    return found


def weight_prefix(saved: Iterable[str]) -> str:
    """Return the prefix of all weights, which NeMo adds."""
    found = (key for key in saved if key.endswith(EMBEDDINGS) and not key.startswith("optimizer."))
    return min(found, key=len, default=EMBEDDINGS).removesuffix(EMBEDDINGS)


def _renamed(leaf: Any, saved: Shapes, prefix: str) -> Any:
    """Return the leaf under the name of the checkpoint; an unknown weight keeps its name."""
    halves = ("", "_w", "_v") if isinstance(leaf, ShardedTensorFactory) else ("",)  # of a gated linear unit
    for candidate in weight_names(prefix + leaf.key):
        if any(candidate + half in saved for half in halves):
            return replace(leaf, key=candidate)
    return leaf


def weight_names(key: str) -> Iterator[str]:
    """Yield the name of a weight, and its names in other layer implementations."""
    yield key
    for pair in NORMS:
        for name, other in (pair, pair[::-1]):
            if name in key:
                yield key.replace(name, other)


def sharded_tensors(tree: Any) -> Iterator[ShardedTensor]:
    """Yield all sharded tensors of a request."""
    if isinstance(tree, ShardedTensorFactory):
        yield from sharded_tensors(tree.build())
    elif isinstance(tree, ShardedTensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from sharded_tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from sharded_tensors(value)


def _difference(tensor: ShardedTensor, saved: Shapes, rows: int) -> str | None:
    """Return the difference between a requested and a saved weight; the vocabulary may have another padding."""
    if tensor.key not in saved:
        return f"{tensor.key} is missing"
    ours, theirs = tuple(tensor.global_shape), saved[tensor.key]
    if theirs is None or ours == theirs:
        return None
    if tensor.allow_shape_mismatch and ours[1:] == theirs[1:]:
        short = f"{tensor.key} has {theirs[0]:,} rows, and the tokenizer has {rows:,} tokens"
        return short if theirs[0] < rows else None
    return f"{tensor.key} is {_size(theirs)} in the checkpoint and {_size(ours)} in the model"


def _size(shape: Sequence[int] | None) -> str:
    return f"[{', '.join(map(str, shape or ()))}]"
