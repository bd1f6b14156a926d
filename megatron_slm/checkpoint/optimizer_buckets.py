"""Load optimizer state from Megatron-LM's default format ``dp_reshardable``.

The format stores the buckets of the distributed optimizer, in which parameters have no names. It can be loaded by a run
with the same parameters in the same order on every rank, which means the same TP, PP and EP. The master weights in the
buckets are compared with the model's weights, so that another order is noticed.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_slm.checkpoint.optimizer_state import Reader, restored_state, saved_step
from megatron_slm.checkpoint.requests import Shapes, sharded_tensors
from megatron_slm.mcore.optimizer import allocate_adam_state, optimizer_parts, separate_adam_steps
from megatron_slm.runtime.collective import gather_on_every_rank, on_every_rank
from megatron_slm.runtime.errors import ConfigError

FORMAT = {"distrib_optim_sharding_type": "dp_reshardable"}
_KEY = re.compile(r"(?P<chained>chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.gbuf_idx_")
REMEDY = (
    "Add --no-load-optim to start with a new optimizer state, use the layout of the checkpoint's run and "
    "--use-distributed-optimizer, or save the checkpoint with Megatron-LM's --dist-ckpt-optim-fully-reshardable."
)


def has_buckets(saved: Shapes) -> bool:
    """Return whether the checkpoint stores optimizer state in buckets."""
    return any(_KEY.match(key) for key in saved)


def load_buckets(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], saved: Shapes, read: Reader, flag: str
) -> None:
    """Load the optimizer's buckets and step count. The model weights must be loaded first. Collective over all ranks.

    Args:
        model_state: sharded state of the model chunks.
        saved: shapes in the checkpoint.
        read: reads sharded state from the checkpoint; collective.
        flag: flag that names the checkpoint, for error messages.

    Raises:
        ConfigError: the buckets are those of another layout or parameter order; on every rank.
    """
    parts = optimizer_parts(optimizer)
    on_every_rank(lambda: _check_parts(parts, flag))
    allocate_adam_state(optimizer)
    chained = any(match["chained"] for key in saved if (match := _KEY.match(key)))
    metadata = {**FORMAT, "chained_optim_avoid_prefix": not chained}
    request = optimizer.sharded_state_dict(dict(model_state), is_loading=True, metadata=metadata)
    _check_layout(request, saved, flag)
    weights = [_weights(part) for part in parts]
    loaded = read({"buckets": request})["buckets"]
    for number, part in enumerate(parts):
        state = loaded if len(parts) == 1 else loaded[number]
        tensors = {"param_state": _without_steps(state["param_state"])}
        with torch.no_grad():
            part.load_state_dict(restored_state(part, tensors, saved_step(state.get("optimizer")), FORMAT))
    separate_adam_steps(optimizer)
    on_every_rank(lambda: _check_order(parts, weights, flag))


def _check_parts(parts: list[Any], flag: str) -> None:
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        raise ConfigError(f"{flag}: the checkpoint has the state of a distributed optimizer in buckets. {REMEDY}")


def _check_layout(request: Any, saved: Shapes, flag: str) -> None:
    """Validate that the checkpoint has the buckets of all ranks, and no others."""
    requested = {tensor.key: tuple(tensor.global_shape) for tensor in sharded_tensors(request)}
    keys = set().union(*gather_on_every_rank(set(requested)))

    def compare() -> None:
        theirs = {key for key in saved if _KEY.match(key)}
        if keys != theirs or any(saved[key] != shape for key, shape in requested.items()):
            raise ConfigError(f"{flag}: the optimizer state of the checkpoint belongs to another layout. {REMEDY}")

    on_every_rank(compare)


def _weights(part: DistributedOptimizer) -> list[torch.Tensor]:
    """Return copies of the model's weights that this rank updates."""
    return [_shard(part, parameter).clone() for parameter in part.model_param_gbuf_map]


def _shard(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    place = part._get_model_param_range_map(parameter)["param"]
    return parameter.detach().view(-1)[place.start : place.end]


def _check_order(parts: list[DistributedOptimizer], weights: list[list[torch.Tensor]], flag: str) -> None:
    """Validate that the loaded master weights are those of the model."""
    for part, before in zip(parts, weights, strict=True):
        for parameter, weight in zip(part.model_param_gbuf_map, before, strict=True):
            master = part._get_main_param_and_optimizer_states(parameter)["param"]
            if not torch.equal(master.to(weight.dtype), weight):
                raise ConfigError(
                    f"{flag}: the optimizer state of the checkpoint is in another order of parameters, as with another "
                    f"--transformer-impl. {REMEDY}"
                )


def _without_steps(tree: Any) -> Any:
    """Return the state without the step counts that Megatron-Core copies from the unloaded optimizer."""
    if isinstance(tree, dict):
        return {key: _without_steps(value) for key, value in tree.items() if key != "step"}
    return [_without_steps(value) for value in tree] if isinstance(tree, list) else tree
