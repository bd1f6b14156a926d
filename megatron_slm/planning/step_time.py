"""Time of a step on GPUs: matrix products at a measured efficiency, the pipeline, and exposed communication.

The efficiency of matrix products is derived from published throughputs by the same formulas, so that a plan with the
layout of a row has the row's throughput. Communication uses the peaks of data sheets, which is a lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from megatron_slm.config.schema import (
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_slm.model.size import forward_flops_per_token, parameter_count
from megatron_slm.planning.communication import Messages, step_messages, threshold_seconds
from megatron_slm.planning.devices import DEVICES
from megatron_slm.planning.efficiencies import MEASUREMENTS, Measurement
from megatron_slm.planning.flops import (
    attention_flops_per_token,
    head_flops_per_token,
    recomputed_flops_per_token,
    saved_flops_per_token,
    step_flops,
)
from megatron_slm.planning.layout import Layout
from megatron_slm.planning.memory import optimizer_bytes
from megatron_slm.planning.parameters import rank_parameters
from megatron_slm.reference.bubble_plan import plan_bubbles
from megatron_slm.runtime.errors import ConfigError


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak that matrix products reach, with the rows it is interpolated from."""

    value: float
    rows: tuple[Measurement, ...]
    note: str


@dataclass(frozen=True)
class StepTime:
    """Hold the seconds of a step by part; parts add up."""

    compute: float  # matrix products of the slowest stage, forward and backward
    recomputation: float
    bubble: float
    reference: float  # forward passes of the reference model that no bubble hides
    ranking: float
    tensor: float  # exposed communication
    context: float
    pipeline: float
    data: float
    threshold: float
    optimizer: float

    @property
    def total(self) -> float:
        """Return the time of the step."""
        return sum(vars(self).values())


def step_time(layout: Layout, efficiency: float) -> StepTime:
    """Return the time of a step whose matrix products run at ``efficiency`` of the peak."""
    device, count = layout.device, layout.micro_batches
    rate = device.peak(layout.precision) * efficiency
    forward, backward, recomputed = _stage_seconds(layout, rate)
    messages = step_messages(layout, layout.pipeline - 1)
    fill = (layout.pipeline - 1) / layout.virtual
    reference = _reference_forwards(layout) * _reference_seconds(layout, rate)
    return StepTime(
        compute=count * (forward + backward),
        recomputation=count * recomputed,
        bubble=fill * (forward + backward + recomputed),
        reference=reference,
        ranking=(count + fill) * forward if layout.ranks_globally else 0.0,
        tensor=0.0 if layout.config.parallel.tp_comm_overlap else _seconds(layout, messages, "tensor parallelism"),
        context=_exposed_context(layout, messages, rate),
        pipeline=_seconds(layout, messages, "pipeline"),
        data=_exposed_data(layout, messages, forward, backward),
        threshold=threshold_seconds(layout),
        optimizer=_update_seconds(layout),
    )


def _stage_seconds(layout: Layout, rate: float) -> tuple[float, float, float]:
    """Return forward, backward and recomputation time of a micro-batch on the slowest stage, all chunks together."""
    model, tokens = layout.config.model, layout.tokens
    head = head_flops_per_token(layout)
    layers = forward_flops_per_token(model, layout.padded_vocab) - head
    saved = saved_flops_per_token(layout)
    saved_layers = saved - 2 * (1 - layout.selected_share) * head
    slowest = (0.0, 0.0, 0.0)
    for stage in {0, layout.pipeline - 1, layout.pipeline // 2}:
        share = layout.stage_layers(stage) / model.num_layers
        is_last = stage == layout.pipeline - 1
        forward = share * layers + is_last * head
        backward = 2 * forward - share * saved_layers - is_last * (saved - saved_layers)
        flops = (forward, backward, share * recomputed_flops_per_token(layout))
        slowest = max(slowest, flops, key=sum)
    scale = tokens / layout.tensor / rate
    return slowest[0] * scale, slowest[1] * scale, slowest[2] * scale


def _reference_seconds(layout: Layout, rate: float) -> float:
    """Return the time of the reference models' forward passes of one micro-batch on a stage."""
    flops = sum(forward_flops_per_token(each.config.model, layout.padded_vocab) for each in layout.references())
    return flops * layout.tokens / (layout.tensor * layout.pipeline) / rate


def _reference_forwards(layout: Layout) -> int:
    """Return the reference model's forward passes per step that extend the step."""
    count = layout.micro_batches
    if not layout.config.reference.reference_in_bubbles:
        return count
    plan = plan_bubbles(
        layout.pipeline,
        count,
        reference=relative_reference(layout),
        backward=3 if layout.config.training.recompute_granularity == "full" else 2,
    )
    return count - min(after for _, after, _ in plan)


def relative_reference(layout: Layout) -> float:
    """Return the FLOPs of the reference models' forward passes relative to the training model's."""
    theirs = sum(forward_flops_per_token(each.config.model, layout.padded_vocab) for each in layout.references())
    return theirs / forward_flops_per_token(layout.config.model, layout.padded_vocab)


def _seconds(layout: Layout, messages: list[Messages], purpose: str) -> float:
    """Return the time of the messages of one purpose on the links that they use."""
    return sum(found.seconds(layout) for found in messages if found.purpose == purpose)


def _exposed_context(layout: Layout, messages: list[Messages], rate: float) -> float:
    """Return the time by which the exchange of keys and values exceeds the attention that it overlaps with."""
    attention = 3 * attention_flops_per_token(layout.config.model) * layout.step_tokens / layout.world_size / rate
    return max(_seconds(layout, messages, "context parallelism") - attention, 0.0)


def _exposed_data(layout: Layout, messages: list[Messages], forward: float, backward: float) -> float:
    """Return the time of gradient reduction and weight gathering that one micro-batch's passes do not overlap."""
    parallel = layout.config.parallel
    reduced, gathered = (_seconds(layout, messages, purpose) for purpose in ("gradients", "weights"))
    reduced -= backward if parallel.overlap_grad_reduce else 0.0
    gathered -= forward if parallel.overlap_param_gather else 0.0
    return max(reduced, 0.0) + max(gathered, 0.0)


def _update_seconds(layout: Layout) -> float:
    """Return the time of the optimizer, which reads and writes its state, gradients and weights once."""
    config = layout.config
    replicas = layout.data * layout.context if config.parallel.use_distributed_optimizer else 1
    count = rank_parameters(layout, 0).total / replicas
    per_parameter = 2 * optimizer_bytes(config) + 4 + config.training.bytes_per_value
    return count * per_parameter / layout.device.memory_bandwidth


def find_efficiency(layout: Layout) -> Efficiency:
    """Return the efficiency for the run's model, interpolated in the logarithm of its size.

    Raises:
        ConfigError: there is no measurement for the device and precision.
    """
    precision = "bf16" if layout.precision == "fp16" else layout.precision
    device = "h100" if layout.device.name == "h200" else layout.device.name
    has_experts = layout.config.model.num_experts is not None
    size = parameter_count(layout.config.model, layout.padded_vocab)
    rows = _rows(device, precision, has_experts)
    if not rows:
        kind = "with experts " if has_experts else ""
        raise ConfigError(
            f"there are no published throughputs of models {kind}on {layout.device.name} in {precision}: the time "
            "cannot be planned. Use --bf16, another --gpu, or the memory alone (--no-time)."
        )
    value, used = _interpolate(rows, size)
    notes = [] if device == layout.device.name else [f"{layout.device.name} as {device}, whose peak FLOP/s are equal"]
    smallest, largest = rows[0][0], rows[-1][0]
    if size < smallest.parameters:
        value, extra = _below(device, precision, has_experts, size, value, smallest)
        notes.append(f"the model is smaller than all measured ones{extra}")
    elif size > largest.parameters:
        notes.append("the model is larger than all measured ones: the efficiency of the largest is used")
    elif len(used) == 2:
        notes.append("interpolated in the logarithm of the parameter count")
    return Efficiency(value, used, "; ".join(notes))


def _below(
    device: str, precision: str, has_experts: bool, size: int, value: float, smallest: Measurement
) -> tuple[float, str]:
    """Return the efficiency of a model smaller than all FP8 rows, which follows the bf16 rows, and a note."""
    others = _rows(device, "bf16", has_experts) if precision == "fp8" else ()
    if not others or others[0][0].parameters >= smallest.parameters:
        return value, ": the efficiency of the smallest is used, an upper bound"
    small, large = _interpolate(others, size)[0], _interpolate(others, smallest.parameters)[0]
    return value * small / large, ": extrapolated in proportion to the bf16 rows"


def _interpolate(rows: tuple[tuple[Measurement, float], ...], size: int) -> tuple[float, tuple[Measurement, ...]]:
    above = next((index for index, (row, _) in enumerate(rows) if row.parameters >= size), len(rows))
    if above in (0, len(rows)):
        row, value = rows[min(above, len(rows) - 1)]
        return value, (row,)
    (low, first), (high, second) = rows[above - 1], rows[above]
    share = math.log(size / low.parameters) / math.log(high.parameters / low.parameters)
    return first + share * (second - first), (low, high)


@cache
def _rows(device: str, precision: str, has_experts: bool) -> tuple[tuple[Measurement, float], ...]:
    """Return the measurements of a device and precision with their efficiencies, in ascending order of size."""
    found = [
        (row, derive_efficiency(row))
        for row in MEASUREMENTS
        if (row.device, row.precision, row.model.num_experts is not None) == (device, precision, has_experts)
    ]
    return tuple(sorted(found, key=lambda pair: pair[0].parameters))


def derive_efficiency(row: Measurement) -> float:
    """Return the efficiency of matrix products with which the formulas yield the throughput of a row."""
    layout = row_layout(row)
    seconds = layout.step_tokens / row.tokens_per_second / row.gpus
    low, high = 0.01, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if step_time(layout, middle).total > seconds else (low, middle)
    return (low + high) / 2


def row_layout(row: Measurement) -> Layout:
    """Return the layout of a published throughput, with communication that overlaps if its source describes that."""
    tensor, pipeline, context, virtual = row.layout
    per_chunk = row.model.num_layers // pipeline // virtual if virtual > 1 else None
    config = RunConfig(
        model=row.model,
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            num_layers_per_virtual_pipeline_stage=per_chunk,
            sequence_parallel=tensor > 1,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            tp_comm_overlap=tensor > 1 and not row.has_exposed_communication,
            expert_model_parallel_size=row.experts,
        ),
        training=TrainingConfig(
            micro_batch_size=row.micro_batch,
            global_batch_size=row.global_batch,
            bf16=True,
            recompute_granularity=row.recomputation,
        ),
        optimizer=OptimizerConfig(lr=1e-4, accumulate_allreduce_grads_in_fp32=row.has_fp32_gradients),
        precision=replace(PrecisionConfig(), fp8_format="hybrid" if row.precision == "fp8" else None),
    )
    return Layout(config, row.gpus, row.vocab_size, DEVICES[row.device])


def model_flops_utilization(layout: Layout, seconds: float) -> float:
    """Return the MFU of a step: FLOPs of the training model's forward and backward pass, relative to the peak.

    As in the log of a run, FP8 runs are relative to the bf16 peak.
    """
    peak = layout.device.peak(layout.config.training.params_dtype)
    return step_flops(layout).model / seconds / layout.world_size / peak
