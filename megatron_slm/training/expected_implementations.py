"""Obstacles to the fastest implementations of a run that is not built, for --require-fused with --dry-run."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

import torch

from megatron_slm.config.relations.wording import data_parallel_size
from megatron_slm.config.schema import RunConfig
from megatron_slm.mcore.gradient_fusion import fuses_weight_gradients
from megatron_slm.model.gpt import choose_cross_entropy, virtual_stages
from megatron_slm.model.specs import IN_FP32, choose_implementation, engine_obstacle, local_reason
from megatron_slm.runtime.errors import ConfigError

FILTERED = "--slm-backward filtered"


def check_expected(config: RunConfig, device: torch.device, world_size: int) -> None:
    """Raise ConfigError if the run would not have the fastest implementation of a part of --require-fused."""
    refuse_fallbacks(expected_obstacles(config, device, world_size), config.training.require_fused)


def refuse_fallbacks(obstacles: Mapping[str, str], required: Sequence[str]) -> None:
    """Raise ConfigError if a required part has an obstacle.

    Args:
        obstacles: by part; empty for the fastest implementation.
        required: parts of --require-fused.
    """
    if missing := [f"{part}: {obstacles[part]}" for part in required if obstacles.get(part)]:
        raise ConfigError(
            f"--require-fused: the fastest implementation is not used. {'; '.join(missing)}. Remove the obstacles "
            "(docs/hopper.md), or leave these parts out of --require-fused."
        )


def expected_obstacles(config: RunConfig, device: torch.device, world_size: int) -> dict[str, str]:
    """Return the obstacle to the fastest implementation of each part, as found in the settings and on this machine.

    A run inspects its objects instead (:mod:`megatron_slm.training.implementations`).
    """
    params_dtype = config.training.params_dtype
    implementation = choose_implementation(config.model.transformer_impl, device, params_dtype)
    local = local_reason(device, params_dtype)
    engine = "" if implementation == "transformer_engine" else local
    filtered = FILTERED if config.objective.slm_backward == "filtered" else ""
    return {
        "linear": filtered or engine,
        "attention": engine or (IN_FP32 if params_dtype == "fp32" else ""),
        "norm": engine,
        "rope": _rope(config, engine),
        "weight-gradient": filtered or _weight_gradient(config, implementation, device, local),
        "adam": _adam(config, device, local),
        "lm-head": _lm_head(config, device),
        "fp8": "" if config.precision.fp8_format else "--fp8-format is not given",
        "reference": _reference(config),
        **_overlaps(config, world_size),
    }


def _rope(config: RunConfig, engine: str) -> str:
    if config.model.position_embedding_type != "rope":
        return ""
    rotates_by_id = config.data.reset_position_ids and (engine or not config.data.reset_attention_mask)
    return "--reset-position-ids" if rotates_by_id else engine


def _weight_gradient(config: RunConfig, implementation: str, device: torch.device, local: str) -> str:
    if device.type != "cuda" or not fuses_weight_gradients(implementation):
        return local
    return "" if config.training.gradient_accumulation_fusion else "--no-gradient-accumulation-fusion"


def _adam(config: RunConfig, device: torch.device, local: str) -> str:
    is_fused = engine_obstacle(device) is None or importlib.util.find_spec("amp_C") is not None
    return "" if device.type == "cuda" and (is_fused or config.optimizer.optimizer == "adam") else local


def _lm_head(config: RunConfig, device: torch.device) -> str:
    used = choose_cross_entropy(config.objective.slm_cross_entropy, device)
    return "" if used == "triton" else f"--slm-cross-entropy {used}, the default without a GPU and Triton"


def _reference(config: RunConfig) -> str:
    has_model = config.reference.is_co_located and not config.reference.reference_scores
    return "--reference-fp8 is not given" if has_model and not config.reference.reference_fp8 else ""


def _overlaps(config: RunConfig, world_size: int) -> dict[str, str]:
    parallel = config.parallel
    ranks = data_parallel_size(config, world_size) * parallel.context_parallel_size
    is_interleaved = virtual_stages(config.model, parallel) is not None
    pipeline = "--no-overlap-p2p-communication" if is_interleaved else "no interleaved schedule"
    overlaps = {
        "grad-reduce": (ranks, parallel.overlap_grad_reduce, "no --overlap-grad-reduce"),
        "param-gather": (
            ranks if parallel.use_distributed_optimizer else 1,
            parallel.overlap_param_gather,
            "no --overlap-param-gather",
        ),
        "tp-comm": (parallel.tensor_model_parallel_size, parallel.tp_comm_overlap, "no --tp-comm-overlap"),
        "p2p-comm": (
            parallel.pipeline_model_parallel_size,
            is_interleaved and parallel.overlap_p2p_comm,
            pipeline,
        ),
    }
    return {part: "" if size == 1 or used else obstacle for part, (size, used, obstacle) in overlaps.items()}
