"""Load optimizer state from checkpoints independently of the optimizer implementation.

Megatron-Core stores the state of its three optimizers (fp32, bf16 with fp32 master weights, distributed) under the same
tensor names but in different structures, and on loading replaces the configured parameter groups with the
checkpoint's. Here tensors are read by name, and parameter groups keep the configured settings with the checkpoint's
step count. A run can therefore resume with another of these optimizers, with other betas, or with Transformer Engine's
or apex's fused Adam instead of torch's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_slm.checkpoint.requests import Shapes, sharded_tensors
from megatron_slm.mcore.optimizer import allocate_adam_state, optimizer_parts, separate_adam_steps
from megatron_slm.runtime.collective import on_every_rank
from megatron_slm.runtime.errors import ConfigError

# The only sharding of the optimizer state that can be loaded in any layout. It is gathered on the first data-parallel
# rank, which writes it; without the second setting, every data-parallel rank would hold a copy in host memory. Without
# the third, names would depend on the layout: with expert parallelism, experts have an optimizer of their own.
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
MASTERS = {"param", "fp32_param"}  # names of master weights in the distributed and the bf16 optimizer
MOMENTUM = "momentum_buffer"
_KEY = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?P<name>\w+?)\.(?P<parameter>.+)")

_OTHER_FORMAT = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.")

Reader = Callable[[dict[str, Any]], dict[str, Any]]  # reads sharded state from the checkpoint


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool
) -> dict[Any, Any]:
    """Return Megatron-Core's sharded state of the optimizer."""
    allocate_adam_state(optimizer)
    state = optimizer.sharded_state_dict(dict(model_state), is_loading=is_loading, metadata=OPTIMIZER_FORMAT)
    for part in (state, *(part for part in state.values() if isinstance(part, dict))):
        if part.get("param_state", part) is None:  # on ranks that do not gather; would differ from the gathering rank
            del part["param_state"]
    _move_step_to_host(state)
    return state


def _move_step_to_host(state: dict[Any, Any]) -> None:
    """Move the step count of torch's fused Adam from the GPU, which may have no counterpart in other processes."""
    for key, value in state.items():
        if key == "common_step":
            state[key] = value.cpu()
        elif isinstance(value, dict):
            _move_step_to_host(value)


def load_optimizer_state(
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    saved: Shapes,
    step: float,
    read: Reader,
    flag: str,
) -> None:
    """Load the optimizer's tensors and set its step count. The model weights must be loaded first.

    Args:
        model_state: sharded state of the model chunks.
        saved: shapes in the checkpoint.
        step: update count of the saved optimizer.
        read: reads sharded state from the checkpoint; collective.
        flag: flag that names the checkpoint, for error messages.

    Raises:
        ConfigError: the checkpoint contains the state of another type of optimizer.
    """
    keys = {(match["name"], match["parameter"]): key for key in saved if (match := _KEY.match(key))}
    names = {name for name, _ in keys}
    _check_format(names, saved, flag)
    request = _select(sharded_optimizer_state(optimizer, model_state, is_loading=True), _tensor)
    _check_names(request, names, step, flag)
    found = _select(request, _saved_as(keys))
    on_every_rank(lambda: check_slices(found, saved, flag))
    loaded = read({"tensors": found})["tensors"] if found else {}
    if not names & MASTERS and (weights := _select(request, _master_as_weight)):
        merge(loaded, read({"tensors": weights})["tensors"])
    parts = optimizer_parts(optimizer)
    for number, part in enumerate(parts):
        part.load_state_dict(restored_state(part, loaded if len(parts) == 1 else loaded.get(number, {}), step))
    separate_adam_steps(optimizer)


def saved_step(state: Any) -> float:
    """Return the update count of a saved optimizer state, stored for the optimizer or in its parameter groups."""
    if isinstance(state, dict):
        for key in ("common_step", "step"):
            if state.get(key) is not None:
                return float(state[key])
        state = list(state.values())
    return max(map(saved_step, state), default=0.0) if isinstance(state, list) else 0.0


def master_weight_request(model_state: dict[str, Any], saved: Iterable[str]) -> dict[str, Any]:
    """Return a request that maps the model's weights to the fp32 master weights of a bf16 checkpoint."""
    masters = {match["parameter"]: key for key in saved if (match := _KEY.match(key)) and match["name"] in MASTERS}

    def as_master(leaf: ShardedBase) -> ShardedBase | None:
        key = masters.get(leaf.key)
        return replace(leaf, key=key) if key is not None and _tensor(leaf) else None

    return _select(model_state, as_master) or {}


def _check_format(names: set[str], saved: Iterable[str], flag: str) -> None:
    """Validate that the state is stored by parameter, in one piece each."""
    others = [key for key in saved if _OTHER_FORMAT.match(key)]
    if others and not names:
        raise ConfigError(
            f"{flag}: the optimizer state of the checkpoint is in a format of Megatron-Core that is not supported "
            f"({others[0]}). Add --no-load-optim to start with a new optimizer state, or save the checkpoint with "
            "Megatron-LM's --dist-ckpt-optim-fully-reshardable."
        )


def check_slices(request: Any, saved: Shapes, flag: str) -> None:
    """Validate that the state of every parameter has the shape of the parameter.

    Earlier versions of Megatron-Core saved slices of flattened parameters, which current ones cannot read.
    """
    for tensor in sharded_tensors(request):
        shape = saved.get(tensor.key)
        if shape is not None and shape != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            raise ConfigError(
                f"{flag}: {tensor.key} is {list(shape)} in the checkpoint and {list(tensor.global_shape)} in the "
                "model, as in the earlier format fully_sharded_model_space, which Megatron-Core no longer reads. Add "
                "--no-load-optim to start with a new optimizer state."
            )


def _check_names(request: Any, names: set[str], step: float, flag: str) -> None:
    """Validate that the checkpoint has the required state.

    Master weights can be derived from weights, and momentum may start at zero; Adam's moments are required.
    """
    wanted: set[str] = set()
    _select(request, lambda leaf: wanted.add(_KEY.match(leaf.key)["name"]))  # type: ignore[index]
    missing = wanted - names - MASTERS - {MOMENTUM}
    if missing and step > 0:
        raise ConfigError(
            f"{flag}: the checkpoint contains the optimizer state {', '.join(sorted(names)) or 'of no optimizer'}, "
            f"but --optimizer needs {', '.join(sorted(wanted))}. Use the --optimizer of the checkpoint, or add "
            "--no-load-optim to start with a new optimizer state."
        )


def _select(tree: Any, choose: Callable[[Any], Any]) -> Any:
    """Return the tree with each sharded leaf replaced by ``choose(leaf)``, without other leaves and empty branches."""
    if isinstance(tree, ShardedBase):
        return choose(tree)
    if isinstance(tree, dict):
        branches = {key: _select(value, choose) for key, value in tree.items()}
        return {key: value for key, value in branches.items() if value is not None} or None
    if isinstance(tree, list):
        return [value for value in (_select(each, choose) for each in tree) if value is not None] or None
    return None


def _tensor(leaf: ShardedBase) -> ShardedBase | None:
    return leaf if isinstance(leaf, ShardedTensor | ShardedTensorFactory) else None


def _saved_as(keys: Mapping[tuple[str, str], str]) -> Callable[[ShardedBase], ShardedBase | None]:
    """Return a function that requests a tensor by its key in the checkpoint.

    Master weights have two names, and keys have a prefix in some checkpoints with expert parallelism.
    """
    names = {name for name, _ in keys}

    def choose(leaf: ShardedBase) -> ShardedBase | None:
        match = _KEY.match(leaf.key)
        assert match is not None, leaf.key
        name = match["name"]
        saved = next(iter(names & MASTERS), None) if name in MASTERS else name
        if saved is None or saved not in names:
            return None
        key = leaf.key.replace(f"optimizer.state.{name}.", f"optimizer.state.{saved}.", 1)
        return replace(leaf, key=keys.get((saved, match["parameter"]), key))

    return choose


def _master_as_weight(leaf: ShardedBase) -> ShardedBase | None:
    """Request the model weight for a master weight, since an fp32 optimizer saves no separate copy."""
    match = _KEY.match(leaf.key)
    return replace(leaf, key=match["parameter"]) if match and match["name"] in MASTERS else None


def restored_state(
    part: Any, tensors: dict[Any, Any], step: float, sharding: Mapping[str, object] = OPTIMIZER_FORMAT
) -> dict[str, Any]:
    """Return the state dictionary of one optimizer: loaded tensors, configured groups, and the step count.

    Args:
        part: one of the chained optimizers.
        tensors: loaded state.
        step: update count.
        sharding: format of the state of a distributed optimizer.
    """
    inner = part.optimizer.state_dict()
    groups = [dict(group) for group in inner["param_groups"]]
    counts_per_parameter = isinstance(part.optimizer, torch.optim.Adam)
    if not counts_per_parameter and not isinstance(part.optimizer, torch.optim.SGD):
        groups = [{**group, "step": int(step)} for group in groups]  # fused Adam counts per group
    if isinstance(part, DistributedOptimizer):
        shown = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        if counts_per_parameter:
            shown = [{**group, "step": step} for group in shown]
        state: dict[str, Any] = {"optimizer": {**inner, "param_groups": shown}}
        state["optimizer"].pop("state")
        if "param_state" in tensors:
            state["param_state"] = tensors["param_state"]
            state["param_state_sharding_type"] = sharding["distrib_optim_sharding_type"]
        return state
    is_bf16 = isinstance(part, Float16OptimizerWithFloat16Params)
    found = (tensors.get("optimizer", {}) if is_bf16 else tensors).get("state", {})
    states = {number: {**state, **found.get(number, {})} for number, state in inner["state"].items()}
    if counts_per_parameter:
        states = {number: {**state, "step": torch.tensor(float(step))} for number, state in states.items()}
    plain = {"state": states, "param_groups": groups}
    masters = part.state_dict()["fp32_from_fp16_params"] if is_bf16 else None
    return (
        {"optimizer": plain, "fp32_from_fp16_params": tensors.get("fp32_from_fp16_params", masters)}
        if is_bf16
        else plain
    )
