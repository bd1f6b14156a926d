"""Search for the fastest layout that fits, and the reasons against the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from megatron_slm.config.recipe import to_flat_dict, with_settings
from megatron_slm.config.relations import inference_violations
from megatron_slm.config.relations.model import attention_problem
from megatron_slm.config.schema import ModelConfig, RunConfig
from megatron_slm.planning.cpu_rates import MeasuredRates
from megatron_slm.planning.cpu_time import cpu_step_time
from megatron_slm.planning.devices import GIB, Device
from megatron_slm.planning.layout import Layout
from megatron_slm.planning.memory import Memory, peak_memory
from megatron_slm.planning.step_time import StepTime, find_efficiency, step_time
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.training.preflight import resolve_values

EQUAL = 1.01  # plans within 1 % are equally fast: published throughputs do not resolve the size of micro-batches
ENOUGH_TOKENS = 8192  # of a micro-batch, from which larger ones are not preferred
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
LONG_SAMPLE = 8192  # tokens per rank from which context parallelism is tried
UNEVEN = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
SEARCHED = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    *UNEVEN,
    "reference_in_bubbles",
    "tp_comm_overlap",
    "context_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
)


@dataclass(frozen=True)
class Problem:
    """Hold a run to be planned: its settings, the devices, and the sizes that its files would tell."""

    config: RunConfig  # as given, unresolved
    world_size: int
    vocab_size: int
    device: Device
    reference_models: tuple[ModelConfig | None, ...] = ()

    def layout(self, settings: dict[str, Any]) -> Layout:
        """Return the layout with some settings replaced.

        Raises:
            ConfigError: the settings violate a relation of the configuration.
        """
        config = resolve_values(with_settings(self.config, settings), self.world_size, has_files=False)
        layout = Layout(config, self.world_size, self.vocab_size, self.device, self.reference_models)
        if layout.uses_engine and (problem := attention_problem(config, config.training.params_dtype)) is not None:
            raise ConfigError(problem)
        for reference in layout.references():
            if problems := inference_violations(reference.config, self.world_size):
                raise ConfigError(f"reference model: {problems[0]}")
        if layout.device.is_gpu:
            layout.device.peak(layout.precision)  # raises ConfigError for a precision that the device lacks
        return layout


@dataclass(frozen=True)
class Plan:
    """Hold a layout with its memory and, on GPUs, its time."""

    layout: Layout

    @cached_property
    def memory(self) -> Memory:
        """Return the memory of the rank that needs most."""
        return peak_memory(self.layout)

    @cached_property
    def time(self) -> StepTime:
        """Return the time of a step."""
        if not self.layout.device.is_gpu:
            return cpu_step_time(self.layout, MeasuredRates())
        return step_time(self.layout, find_efficiency(self.layout).value)

    @property
    def fits(self) -> bool:
        """Return whether the memory of the device is sufficient."""
        return self.memory.total <= self.layout.device.usable

    @property
    def settings(self) -> dict[str, Any]:
        """Return the searched settings."""
        values = to_flat_dict(self.layout.config)
        return {name: values[name] for name in SEARCHED}


def search(problem: Problem) -> Plan | None:
    """Return the fastest plan that fits and satisfies all relations, or None if no layout fits.

    Raises:
        ConfigError: settings that no layout can satisfy.
    """
    _check_batch(problem)
    valid: list[Plan] = []
    refused: set[str] | None = None  # messages that all refused layouts share
    for plan in sorted(candidates(problem), key=lambda plan: plan.time.total):
        if valid and plan.time.total > EQUAL * valid[0].time.total:
            break
        try:
            valid.append(Plan(problem.layout(plan.settings)))
        except ConfigError as error:
            messages = {line.strip() for line in str(error).splitlines() if not line.endswith("problems:")}
            refused = messages if refused is None else refused & messages
    if not valid and refused:
        raise ConfigError("no layout is valid:\n" + "\n".join(sorted(refused)))
    return min(valid, key=_preference, default=None)


def _check_batch(problem: Problem) -> None:
    """Raise ConfigError if no layout divides the global batch among its data-parallel ranks."""
    batch, world = problem.config.training.global_batch_size, problem.world_size
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    shared = {math.prod(settings[name] for name in sizes) for settings in layouts(problem)}
    if not any(batch % (world // ranks) == 0 for ranks in shared):
        multiple = world // max(shared)
        raise ConfigError(
            f"--global-batch-size {batch} is not a multiple of the data-parallel ranks of any layout of {world} "
            f"devices. Choose a multiple of {multiple}, or another number of devices."
        )


def _preference(plan: Plan) -> tuple[int, ...]:
    """Return the order of equally fast plans: less model parallelism, larger matrix products, less memory."""
    layout = plan.layout
    return layout.tensor, layout.pipeline * layout.context, -min(layout.tokens, ENOUGH_TOKENS), plan.memory.total


def candidates(problem: Problem) -> Iterator[Plan]:
    """Yield plans that fit, before their relations are checked: of each layout and micro-batch size the fastest."""
    batch = problem.config.training.global_batch_size
    for settings in layouts(problem):
        config = with_settings(problem.config, settings)
        base = Layout(config, problem.world_size, problem.vocab_size, problem.device, problem.reference_models)
        for size in MICRO_BATCHES:
            if batch % (size * base.data):
                continue
            plan = _least_recomputation(base, size)
            if plan is None:
                break  # larger micro-batches need more memory
            yield plan


def _least_recomputation(base: Layout, micro_batch_size: int) -> Plan | None:
    """Return the plan that fits with as few recomputed layers as possible, or None."""
    for recomputation in recomputations(base):
        training = replace(base.config.training, micro_batch_size=micro_batch_size, **recomputation)
        plan = Plan(replace(base, config=replace(base.config, training=training)))
        if plan.fits:
            return plan
    return None


def recomputations(layout: Layout) -> list[dict[str, Any]]:
    """Return settings of recomputation: none, of a part of the layers, of all layers."""
    layers = layout.stage_layers(0) // layout.virtual
    parts = sorted({layers * quarters // 4 for quarters in (1, 2, 3)} - {0})
    return [
        _recomputation(None, None, None),
        *(_recomputation("full", "block", part) for part in parts),
        _recomputation("full", "uniform", 1),
    ]


def _recomputation(granularity: str | None, method: str | None, layers: int | None) -> dict[str, Any]:
    return {"recompute_granularity": granularity, "recompute_method": method, "recompute_num_layers": layers}


def layouts(problem: Problem) -> Iterator[dict[str, Any]]:
    """Yield settings of all parallel layouts that divide the model, without tensor parallelism over nodes."""
    config, world = problem.config, problem.world_size
    model = config.model
    tensors = _divisors(model.num_attention_heads, min(problem.device.per_node, world))
    pipelines = sorted({*_divisors(model.num_layers, world), config.parallel.pipeline_model_parallel_size})
    given = config.parallel.context_parallel_size
    contexts = {given} | {2**power for power in range(7) if model.seq_length >> power >= LONG_SAMPLE // 2}
    for tensor, pipeline, context in product(tensors, pipelines, sorted(contexts)):
        if world % (tensor * pipeline * context):
            continue
        for chunk in _chunks(model.num_layers, pipeline):
            yield {**_dependent(config, tensor, pipeline, chunk), "context_parallel_size": context}


def _dependent(config: RunConfig, tensor: int, pipeline: int, chunk: int | None) -> dict[str, Any]:
    """Return the settings of a tensor- and pipeline-parallel layout, without those that have no effect in it."""
    parallel, has_bubbles = config.parallel, pipeline > 1 and chunk is None
    keeps = has_bubbles and pipeline == parallel.pipeline_model_parallel_size
    return {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "tp_comm_overlap": parallel.tp_comm_overlap and tensor > 1,
        "pipeline_model_parallel_size": pipeline,
        "num_layers_per_virtual_pipeline_stage": chunk,
        "reference_in_bubbles": config.reference.reference_in_bubbles and has_bubbles,
        **{name: getattr(parallel, name) if keeps else None for name in UNEVEN},
    }


def _divisors(number: int, limit: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({divisor for pair in small for divisor in (pair, number // pair) if divisor <= limit})


def _chunks(layers: int, pipeline: int) -> list[int | None]:
    """Return the numbers of layers per virtual stage; None is the schedule without them."""
    if pipeline == 1:
        return [None]
    return [None, *(chunk for chunk in _divisors(layers // pipeline, layers // pipeline - 1))]


@dataclass(frozen=True)
class Rejection:
    """Represent a neighbor of the plan, and the reason against it."""

    settings: dict[str, Any]  # that differ from the plan's
    reason: str


def rejections(problem: Problem, plan: Plan) -> list[Rejection]:
    """Return the neighbors of a plan in each direction of the search, with the reasons against them."""
    found = []
    for changes in _neighbors(problem, plan):
        try:
            other = Plan(problem.layout(plan.settings | changes))
        except ConfigError as error:
            found.append(Rejection(changes, str(error).splitlines()[-1].strip()))
            continue
        found.append(Rejection(changes, _compare(other, plan)))
    return found


def _compare(other: Plan, plan: Plan) -> str:
    if not other.fits:
        needed, limit = other.memory.total / GIB, other.layout.device.usable / GIB
        return f"needs {needed:.1f} GiB of {limit:.1f}"
    slower = other.time.total / plan.time.total - 1
    causes = [(seconds - vars(plan.time)[name], name) for name, seconds in vars(other.time).items()]
    return f"{100 * slower:.1f} % slower ({max(causes)[1]})" if slower > 5e-4 else _equal(other, plan)


def _equal(other: Plan, plan: Plan) -> str:
    if other.memory.total >= plan.memory.total:
        return "as fast, with more memory"
    return "as fast, with smaller matrix products or more model parallelism"


def _neighbors(problem: Problem, plan: Plan) -> Iterator[dict[str, Any]]:
    layout, model = plan.layout, problem.config.model
    tensors = _divisors(model.num_attention_heads, min(problem.device.per_node, problem.world_size))
    pipelines = _divisors(model.num_layers, problem.world_size)
    for name, values, current in (
        ("tensor_model_parallel_size", tensors, layout.tensor),
        ("pipeline_model_parallel_size", pipelines, layout.pipeline),
        ("micro_batch_size", list(MICRO_BATCHES), layout.config.training.micro_batch_size),
        ("context_parallel_size", [1, 2, 4, 8, 16], layout.context),
    ):
        for value in _adjacent(values, current):
            tensor = value if name == "tensor_model_parallel_size" else layout.tensor
            pipeline = value if name == "pipeline_model_parallel_size" else layout.pipeline
            context = value if name == "context_parallel_size" else layout.context
            kept = layout.config.parallel.num_layers_per_virtual_pipeline_stage
            chunk = kept if pipeline == layout.pipeline else None
            if problem.world_size % (tensor * pipeline * context) == 0:
                yield {name: value, **_dependent(problem.config, tensor, pipeline, chunk)}
    if layout.virtual > 1:
        yield {"num_layers_per_virtual_pipeline_stage": None}
    training, options = layout.config.training, recomputations(layout)
    given = _recomputation(training.recompute_granularity, training.recompute_method, training.recompute_num_layers)
    place = options.index(given) if given in options else 0
    yield from options[max(place - 1, 0) : place] + options[place + 1 : place + 2]


def _adjacent(values: Sequence[int], current: int) -> list[int]:
    smaller = [value for value in values if value < current]
    larger = [value for value in values if value > current]
    return smaller[-1:] + larger[:1]


@dataclass(frozen=True)
class Remedy:
    """Represent a change of settings or devices, and the plan that it makes possible, if any."""

    name: str
    plan: Plan | None


def remedies(problem: Problem) -> list[Remedy]:
    """Return changes in the order in which to try them, if no layout fits."""
    config, found = problem.config, []
    for name, changes in _remedial_settings(config, problem):
        found.append(Remedy(name, search(replace(problem, config=with_settings(config, changes)))))
    together: dict[str, Any] = {}
    for _, changes in _remedial_settings(config, problem):
        together |= changes
    if len(found) > 1 and not any(remedy.plan for remedy in found):
        found.append(Remedy("all of these", search(replace(problem, config=with_settings(config, together)))))
    if (count := smallest_world(problem)) is not None:
        found.append(Remedy(f"--gpus {count}", search(replace(problem, world_size=count))))
    return found


def _remedial_settings(config: RunConfig, problem: Problem) -> Iterator[tuple[str, dict[str, Any]]]:
    parallel, reference = config.parallel, config.reference
    if not parallel.use_distributed_optimizer and config.optimizer.optimizer == "adam":
        yield "--use-distributed-optimizer", {"use_distributed_optimizer": True}
    if config.training.params_dtype == "fp32" and problem.device.is_gpu:
        yield "--bf16", {"bf16": True}
    supports_fp8 = config.training.bf16 and config.model.transformer_impl != "local" and "fp8" in problem.device.flops
    if supports_fp8 and reference.reference_load and not reference.reference_fp8:
        yield "--reference-fp8", {"reference_fp8": True}
    if reference.reference_load:
        scores = {"reference_load": [], "reference_in_bubbles": False, "reference_fp8": False}
        scores |= {"reference_combine": "mean", "reference_corpora": []}  # several sidecars need no more than one
        yield (
            "--reference-scores instead of --reference-load (tools/score_corpus.py)",
            {**scores, "reference_scores": ["scores"]},
        )
    if config.training.bf16 and config.optimizer.accumulate_allreduce_grads_in_fp32:
        yield "--grad-reduce-in-bf16", {"accumulate_allreduce_grads_in_fp32": False}
    if not config.precision.use_precision_aware_optimizer and config.training.bf16 and problem.device.is_gpu:
        yield (
            "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
            {
                "use_precision_aware_optimizer": True,
                "use_distributed_optimizer": True,
                "exp_avg_dtype": "bf16",
                "exp_avg_sq_dtype": "bf16",
            },
        )
    if config.objective.slm_saved_logits_mb is None or config.objective.slm_saved_logits_mb > 0:
        yield "--slm-saved-logits-mb 0", {"slm_saved_logits_mb": 0}


def smallest_world(problem: Problem, limit: int = 16384) -> int | None:
    """Return the smallest larger number of devices, by doubling, on which a layout fits, or None up to the limit."""
    count = problem.world_size
    while (count := 2 * count) <= limit:
        try:
            if search(replace(problem, world_size=count)) is not None:
                return count
        except ConfigError:  # the batch is too small for so many ranks
            return None
    return None
