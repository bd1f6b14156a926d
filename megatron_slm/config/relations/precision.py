"""Relations of precision: fp16 and bf16, loss scaling, FP8, and optimizer state in lower precision.

Megatron-Core runs some of these combinations in bf16 without a message, and ignores settings in others.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.relations.wording import TENSOR
from megatron_slm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainingConfig

LOCAL = "needs --transformer-impl transformer_engine; local layers would run in bf16."
MULTIPLES = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}  # of the sizes of FP8 products, by recipe


def sixteen_bits(config: RunConfig, _: int) -> Iterator[str]:
    """Require one 16-bit format, and loss-scaling settings that fit each other."""
    training, precision = config.training, config.precision
    if training.fp16 and training.bf16:
        yield "--fp16 and --bf16 were both given. Give one."
    if training.fp16 and precision.has_dynamic_loss_scale and precision.min_loss_scale > precision.initial_loss_scale:
        yield (
            f"--min-loss-scale {precision.min_loss_scale:g} is above --initial-loss-scale "
            f"{precision.initial_loss_scale:g}. Reduce it."
        )
    if precision.loss_scale_window % 1:
        yield f"--loss-scale-window {precision.loss_scale_window:g} is no number of steps. Give an integer."
    if precision.loss_scale and training.params_dtype == "fp32" and not config.parallel.use_distributed_optimizer:
        yield f"--loss-scale {precision.loss_scale:g} has no effect in fp32. Add --fp16, or leave it out."


def fp8(config: RunConfig, _: int) -> Iterator[str]:
    """Require a model, recipe and layout that run in FP8."""
    precision = config.precision
    if precision.fp8_format is None:
        yield from _without_fp8(config)
        return
    flag = f"--fp8-format {precision.fp8_format}"
    if not config.training.bf16:
        yield f"{flag} needs --bf16, the precision of all other operations."
    if config.model.transformer_impl == "local":
        yield f"{flag} {LOCAL}"
    if config.objective.slm_backward == "filtered":
        yield f"{flag} cannot be combined with --slm-backward filtered, whose linear layers run in bf16."
    if config.logging.eval_tasks:
        yield (
            f"{flag} cannot be combined with --eval-tasks: FP8 products need sequence lengths of a multiple of "
            f"{MULTIPLES[precision.fp8_recipe]}. Evaluate checkpoints with tools/evaluate.py."
        )
    if precision.fp8_param_gather and not config.parallel.use_distributed_optimizer:
        yield "--fp8-param-gather needs --use-distributed-optimizer."
    yield from _recipe(precision)
    yield from _layers_in_bf16(config)
    yield from unaligned_sizes(config.model, config.parallel, config.training, precision.fp8_recipe, flag)


def _without_fp8(config: RunConfig) -> Iterator[str]:
    """Yield a message for settings that need FP8."""
    precision, default = config.precision, PrecisionConfig()
    names = [
        *("fp8_param_gather", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad"),
        *("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
        *(() if config.reference.reference_fp8 else ("fp8_recipe",)),
    ]
    if given := _changed(precision, default, names):
        yield f"{' '.join(given)} has no effect without --fp8-format. Add --fp8-format hybrid, or leave it out."


def _changed(precision: PrecisionConfig, default: PrecisionConfig, names: list[str]) -> list[str]:
    """Return the flags of the settings that differ from the defaults."""
    changed = [name for name in names if getattr(precision, name) != getattr(default, name)]
    return ["--no-fp8-wgrad" if name == "fp8_wgrad" else f"--{name.replace('_', '-')}" for name in changed]


def _recipe(precision: PrecisionConfig) -> Iterator[str]:
    """Yield violations between the recipe and its settings, which Megatron-Core passes to the recipe delayed only."""
    names = ["fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad"]
    given = _changed(precision, PrecisionConfig(), names)
    if given and precision.fp8_recipe != "delayed":
        yield (
            f"{' '.join(given)} has no effect with --fp8-recipe {precision.fp8_recipe}. Add --fp8-recipe delayed "
            "(Megatron-LM's default), or leave it out."
        )
    if precision.first_last_layers_bf16 and precision.fp8_recipe == "delayed":
        yield "--first-last-layers-bf16 cannot be combined with --fp8-recipe delayed. Use --fp8-recipe tensorwise."


def _layers_in_bf16(config: RunConfig) -> Iterator[str]:
    """Yield violations of the numbers of layers in bf16."""
    precision, layers = config.precision, config.model.num_layers
    if not precision.first_last_layers_bf16:
        names = ["num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"]
        if given := _changed(precision, PrecisionConfig(), names):
            yield f"{' '.join(given)} has no effect without --first-last-layers-bf16. Add it, or leave it out."
        return
    counts = {
        "--num-layers-at-start-in-bf16": precision.num_layers_at_start_in_bf16,
        "--num-layers-at-end-in-bf16": precision.num_layers_at_end_in_bf16,
    }
    per_stage = layers // config.parallel.pipeline_model_parallel_size
    for flag, count in counts.items():
        if count > per_stage:
            yield f"{flag} {count} is more than the {per_stage} layers of a pipeline stage. Reduce it."
    if sum(counts.values()) >= layers:
        shown = " and ".join(f"{flag} {count}" for flag, count in counts.items())
        yield f"{shown} leave none of the {layers} layers in FP8. Reduce them, or leave --fp8-format out."


def unaligned_sizes(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, recipe: str, flag: str
) -> Iterator[str]:
    """Yield a message if a matrix product of the layers has a size that the FP8 recipe does not support.

    Args:
        model: architecture of the model in FP8.
        parallel: layout.
        training: micro-batch size.
        recipe: FP8 recipe.
        flag: flag that requests FP8, for the message.
    """
    tensor, multiple = parallel.tensor_model_parallel_size, MULTIPLES[recipe]
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    heads = model.num_attention_heads // tensor
    groups = (model.num_query_groups if model.group_query_attention else None) or model.num_attention_heads
    mlp = "ffn-hidden-size" if model.num_experts is None else "moe-ffn-hidden-size"
    channels = model.ffn_hidden_size if model.num_experts is None else model.moe_ffn_hidden_size
    shared = parallel.context_parallel_size * (tensor if parallel.sequence_parallel else 1)
    sizes = {
        "--hidden-size": model.hidden_size,
        f"--{mlp} / {TENSOR}": channels // tensor,
        f"query, key and value channels / {TENSOR}": (heads + 2 * max(groups // tensor, 1)) * width,
        f"attention output channels / {TENSOR}": heads * width,
        "tokens of a micro-batch per rank": training.micro_batch_size * model.seq_length // shared,
    }
    wrong = [f"{name} = {size}" for name, size in sizes.items() if size % multiple]
    if wrong:
        yield (
            f"{flag}: --fp8-recipe {recipe} needs multiples of {multiple}, but {', '.join(wrong)}. Change the sizes, "
            "or leave the flag out."
        )


def reference(config: RunConfig, _: int) -> Iterator[str]:
    """Require a reference replica and a recipe that allow FP8 weights without a copy in higher precision."""
    settings, precision = config.reference, config.precision
    if not settings.reference_fp8:
        return
    if not settings.reference_load:
        yield "--reference-fp8 has no effect without --reference-load."
    if config.model.transformer_impl == "local":
        yield f"--reference-fp8 {LOCAL}"
    if "bf16" not in (settings.reference_precision or config.training.params_dtype):
        yield "--reference-fp8 needs --reference-precision bf16, the precision of all other operations."
    if precision.fp8_recipe == "delayed":
        yield (
            "--reference-fp8 cannot be combined with --fp8-recipe delayed, whose scaling factors a frozen model does "
            "not have. Use --fp8-recipe tensorwise or blockwise."
        )


def optimizer_precision(config: RunConfig, _: int) -> Iterator[str]:
    """Require the optimizer that supports lower precision, and gradients of one dtype."""
    precision, training = config.precision, config.training
    names = ["main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"]
    given = [f"--{name.replace('_', '-')} {getattr(precision, name)}" for name in names]
    lower = [text for text in given if not text.endswith(" fp32")]
    if not precision.use_precision_aware_optimizer:
        if lower:
            yield f"{' '.join(lower)} needs --use-precision-aware-optimizer."
        return
    if config.optimizer.optimizer != "adam":
        yield f"--use-precision-aware-optimizer needs --optimizer adam, not {config.optimizer.optimizer}."
    if not config.parallel.use_distributed_optimizer:
        yield "--use-precision-aware-optimizer needs --use-distributed-optimizer."
    if precision.main_grads_dtype == "bf16" and config.optimizer.accumulate_allreduce_grads_in_fp32:
        yield (
            "--main-grads-dtype bf16 contradicts --accumulate-allreduce-grads-in-fp32, which is the default here. "
            "Add --grad-reduce-in-bf16."
        )
    elif precision.main_grads_dtype == "bf16" and not training.bf16:
        yield "--main-grads-dtype bf16 needs --bf16."


def communication_overlap(config: RunConfig, _: int) -> Iterator[str]:
    """Require sequence parallelism and linear layers that overlap tensor-parallel communication."""
    parallel, flag = config.parallel, "--tp-comm-overlap"
    if not parallel.tp_comm_overlap:
        if parallel.tp_comm_overlap_cfg is not None:
            yield "--tp-comm-overlap-cfg has no effect without --tp-comm-overlap."
        return
    if parallel.tensor_model_parallel_size == 1 or not parallel.sequence_parallel:
        yield f"{flag} needs {TENSOR} above 1 and --sequence-parallel."
    if config.model.transformer_impl == "local":
        yield f"{flag} needs --transformer-impl transformer_engine."
    if config.training.params_dtype == "fp32":
        yield f"{flag} needs --bf16 or --fp16."
    if config.objective.slm_backward == "filtered":
        yield f"{flag} cannot be combined with --slm-backward filtered, whose linear layers do not overlap."
    if config.logging.eval_tasks:
        yield f"{flag} cannot be combined with --eval-tasks, whose sequences do not fill its buffers."


RELATIONS = (sixteen_bits, fp8, reference, optimizer_precision, communication_overlap)
