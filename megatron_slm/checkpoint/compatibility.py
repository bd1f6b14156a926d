"""Additional content of our checkpoints for Megatron-LM, which reads fewer names than :mod:`.requests`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor

from megatron_slm.checkpoint.requests import EXTRA_STATE, NORMS

CHECKPOINT_VERSION = 3.0  # of Megatron-LM: the order of heads in the query/key/value projection


def additional_entries(model: Mapping[str, Any]) -> dict[str, ShardedBase]:
    """Return entries that let models of any layer implementation load the sharded state of a model chunk.

    In a layer with experts, Transformer Engine's norm before the experts has another name than the local one, which
    assumes a dense MLP; the norm is saved under both. Modules of Transformer Engine request an ``_extra_state``, which
    Megatron-Core's local linear layers save empty; local norms and attention have none.
    """
    has_experts = any("mlp.experts." in key for key in model)
    norms = [norm for leaf in model.values() for norm in _norms_of_experts(leaf, has_experts)]
    objects = [state for leaf in (*model.values(), *norms) for state in _extra_states(leaf)]
    present = {_identity(leaf) for leaf in model.values()}
    return {f"additional.{name}": entry for entry in (*norms, *objects) if (name := _identity(entry)) not in present}


def _identity(leaf: ShardedBase) -> str:
    """Return a name that differs between the shards of one tensor, such as the layers of a stacked one."""
    return leaf.unique_key if isinstance(leaf, ShardedObject) else f"{leaf.key} {getattr(leaf, 'global_offset', '')}"


def _norms_of_experts(leaf: Any, has_experts: bool) -> Iterator[ShardedTensor]:
    if isinstance(leaf, ShardedTensor) and has_experts:
        for name, other in (NORMS[1], NORMS[1][::-1]):
            if name in leaf.key:
                yield replace(leaf, key=leaf.key.replace(name, other))


def _extra_states(leaf: Any) -> Iterator[ShardedObject]:
    """Yield the empty state of a norm, and of the attention beside a query/key/value projection."""
    qkv, attention = "self_attention.linear_qkv.", "self_attention.core_attention."
    if isinstance(leaf, ShardedObject) and leaf.key.endswith(qkv + EXTRA_STATE):
        yield replace(leaf, key=leaf.key.replace(qkv, attention), data=None)
    if isinstance(leaf, ShardedTensor) and leaf.key.endswith("layernorm.weight"):
        layers = leaf.prepend_axis_num
        key = leaf.key.removesuffix("weight") + EXTRA_STATE
        shape, offset = leaf.global_shape[:layers] or (1,), leaf.global_offset[:layers] or (0,)
        yield ShardedObject(key, None, tuple(shape), tuple(offset), replica_id=leaf.replica_id)
