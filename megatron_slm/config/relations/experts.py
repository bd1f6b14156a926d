"""Relations of mixture-of-experts settings."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.relations.wording import not_dividing
from megatron_slm.config.schema import RunConfig


def without_experts(config: RunConfig, _: int) -> Iterator[str]:
    """Refuse settings of experts without experts."""
    model = config.model
    if model.num_experts is not None:
        return
    given = [
        flag
        for flag, is_given in (
            ("--expert-model-parallel-size", config.parallel.expert_model_parallel_size > 1),
            ("--moe-ffn-hidden-size", model.moe_ffn_hidden_size is not None),
            ("--moe-aux-loss-coeff", model.moe_aux_loss_coeff > 0),
            ("--moe-z-loss-coeff", model.moe_z_loss_coeff is not None),
            ("--moe-grouped-gemm", model.moe_grouped_gemm),
            ("--moe-router-pre-softmax", model.moe_router_pre_softmax),
        )
        if is_given
    ]
    if given:
        yield f"{' '.join(given)} has no effect without --num-experts."


def with_experts(config: RunConfig, world_size: int) -> Iterator[str]:
    """Require a router and a parallel layout that fit the number of experts."""
    model, parallel = config.model, config.parallel
    if model.num_experts is None:
        return
    tensor = parallel.tensor_model_parallel_size
    if model.moe_router_topk > model.num_experts:
        yield f"--moe-router-topk {model.moe_router_topk} is more than --num-experts {model.num_experts}."
    if model.moe_router_topk == 1 and not model.moe_router_pre_softmax:
        yield (
            "--moe-router-topk 1 needs --moe-router-pre-softmax: the softmax over a single expert is constant, so "
            "the router would receive no gradient."
        )
    yield from expert_parallel(config, world_size)
    for holds, needed in (
        (parallel.sequence_parallel, "--sequence-parallel"),
        (model.disable_bias_linear, "--disable-bias-linear"),
    ):
        if tensor > 1 and not holds:
            yield f"--num-experts with --tensor-model-parallel-size above 1 needs {needed}."
    if model.moe_grouped_gemm and model.transformer_impl == "local":
        yield "--moe-grouped-gemm needs --transformer-impl transformer_engine."


def expert_parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    """Require experts and ranks that expert-parallel groups can split evenly."""
    parallel, flag = config.parallel, "--expert-model-parallel-size"
    expert = parallel.expert_model_parallel_size
    ranks = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    yield from not_dividing(expert, flag, config.model.num_experts or 1, "--num-experts")
    yield from not_dividing(expert, flag, ranks, "ranks that hold the same layers, CP x DP =")


RELATIONS = (without_experts, with_experts)
