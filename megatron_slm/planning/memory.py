"""Memory of a rank by part, at the moment of a step at which it is largest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_slm.config.schema import RunConfig
from megatron_slm.planning.activations import layer_bytes, layer_input_bytes
from megatron_slm.planning.head import head_memory
from megatron_slm.planning.layout import VALUE_BYTES, Layout
from megatron_slm.planning.parameters import RankParameters, matrix_sizes, rank_parameters

FP32 = 4
BATCH_BYTES = 44  # per token of a step: tokens, labels, positions, loss mask, reference loss, metrics
ADAM_TEMPORARIES = 2  # fp32 copies of the largest parameter that torch's AdamW makes


@dataclass(frozen=True)
class Memory:
    """Hold the bytes of one rank by part at the peak of a step."""

    stage: int
    moment: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(self.parts.values())


def peak_memory(layout: Layout) -> Memory:
    """Return the memory of the ranks of the stage that needs most."""
    return max((stage_memory(layout, stage) for stage in range(layout.pipeline)), key=lambda found: found.total)


def stage_memory(layout: Layout, stage: int) -> Memory:
    """Return the memory of a rank of a pipeline stage at its peak."""
    parameters = rank_parameters(layout, stage)
    held = state_bytes(layout.config, parameters, layout.data * layout.context)
    held["reference model"] = reference_bytes(layout, stage)
    held["batches"] = BATCH_BYTES * layout.micro_batches * layout.tokens
    moment, parts = max(_moments(layout, stage, parameters), key=lambda found: sum(found[1].values()))
    used = held | parts
    device = layout.device
    transient = sum(used.values()) - sum(held[name] for name in ("weights", "gradients", "optimizer"))
    used["allocator"] = device.reserve * device.is_gpu + int(device.fragmentation * transient)
    return Memory(stage, moment, used)


def state_bytes(config: RunConfig, parameters: RankParameters, replicas: int) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state on a rank.

    Args:
        replicas: data-parallel x context-parallel ranks, over which the distributed optimizer shards its state.
    """
    size, count = config.training.bytes_per_value, parameters.total
    weights = size * count
    if config.precision.fp8_param_gather and config.precision.fp8_format is not None:
        weights -= parameters.linear  # one byte less each
    gradient = FP32 if config.optimizer.accumulate_allreduce_grads_in_fp32 else size
    experts = max(replicas // config.parallel.expert_model_parallel_size, 1)
    is_sharded = config.parallel.use_distributed_optimizer
    per_value = optimizer_bytes(config)
    sharded = parameters.dense / replicas + parameters.experts / experts if is_sharded else count
    return {"weights": weights, "gradients": gradient * count, "optimizer": int(per_value * sharded)}


def optimizer_bytes(config: RunConfig) -> int:
    """Return the bytes of optimizer state per parameter: main weights of 16-bit models, and moments."""
    precision, is_fp32 = config.precision, config.training.params_dtype == "fp32"
    if config.optimizer.optimizer == "sgd":
        return (FP32 if config.optimizer.sgd_momentum else 0) + (0 if is_fp32 else FP32)
    if not precision.use_precision_aware_optimizer:
        return 2 * FP32 + (0 if is_fp32 else FP32)
    names = (precision.exp_avg_dtype, precision.exp_avg_sq_dtype)
    main = 0 if is_fp32 else VALUE_BYTES[precision.main_params_dtype]
    return sum(VALUE_BYTES[name] for name in names) + main


def reference_bytes(layout: Layout, stage: int) -> int:
    """Return the bytes of the reference models' weights, and of their moving average."""
    settings, held = layout.config.reference, 0
    for reference in layout.references():
        parameters = rank_parameters(reference, stage)
        size = reference.config.training.bytes_per_value
        if settings.reference_history == "average" and size < 4:
            size += 4
        held += size * parameters.total - ((size - 1) * parameters.linear if settings.reference_fp8 else 0)
    return held


def _moments(layout: Layout, stage: int, parameters: RankParameters) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the moments of a step at which memory may be largest, with the bytes by part beside the state."""
    activations, unit = activation_bytes(layout, stage)
    exchanged = pipeline_bytes(layout)
    gather = gather_bytes(layout)
    gradient = layout.value_bytes * max(matrix_sizes(layout.config.model)) // layout.tensor
    yield (
        "backward pass of a layer",
        {
            "activations": activations + unit,
            "workspace": gradient + layer_workspace(layout),
            "communication": exchanged + gather,
        },
    )
    if stage == layout.pipeline - 1:
        head = head_memory(layout)
        final_norm = 2 * layer_input_bytes(layout)
        yield (
            "LM head",
            {"activations": activations + final_norm, "LM head": head.peak, "communication": exchanged + gather},
        )
    yield "update of the weights", {"workspace": update_bytes(layout, parameters)}
    if (reduced := reduction_bytes(layout, parameters)) > 0:
        yield "reduction of gradients", {"communication": reduced}


def activation_bytes(layout: Layout, stage: int) -> tuple[int, int]:
    """Return the bytes of saved activations on a stage, and those of the unit that is recomputed at a time."""
    training, layers = layout.config.training, layout.stage_layers(stage)
    in_flight, layer, start = layout.in_flight(stage), layer_bytes(layout), layer_input_bytes(layout)
    if training.recompute_granularity != "full":
        return int(in_flight * layers * layer), 0
    count = training.recompute_num_layers or 1
    if training.recompute_method == "uniform":
        return int(in_flight * -(-layers // count) * start), count * layer
    recomputed = min(count * layout.virtual, layers)  # --recompute-num-layers is per chunk
    return int(in_flight * (recomputed * start + (layers - recomputed) * layer)), layer if recomputed else 0


def layer_workspace(layout: Layout) -> int:
    """Return the temporary bytes of a layer's backward pass: gradients of the MLP's widest values."""
    return 2 * layer_input_bytes(layout)


def pipeline_bytes(layout: Layout) -> int:
    """Return the bytes of received and sent activations and gradients between stages."""
    return 2 * layer_input_bytes(layout) if layout.pipeline > 1 else 0


def gather_bytes(layout: Layout) -> int:
    """Return the bytes of the buffer in which sequence parallelism gathers the input of linear layers."""
    if not layout.config.parallel.sequence_parallel:
        return 0
    return layout.tokens * layout.config.model.hidden_size * layout.value_bytes


def update_bytes(layout: Layout, parameters: RankParameters) -> int:
    """Return the temporary bytes of the optimizer's update."""
    if layout.device.is_gpu:
        return 0  # fused
    return ADAM_TEMPORARIES * FP32 * parameters.largest


def reduction_bytes(layout: Layout, parameters: RankParameters) -> int:
    """Return the bytes of copies that gloo makes of a gradient buffer which it reduces and scatters."""
    sharded = layout.config.parallel.use_distributed_optimizer and layout.data * layout.context > 1
    return FP32 * parameters.total if sharded and not layout.device.is_gpu else 0
