"""Everything that can be known to be wrong before work begins, without torch and without reading data."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_slm.config.blends import resolve_blends
from megatron_slm.config.schema import Config, ReferenceConfig
from megatron_slm.runtime.errors import ConfigError


def check(config: Config, world_size: int) -> None:
    """Fill in settings that follow from others, then refuse what cannot work.

    Args:
        world_size: processes that were started.

    Raises:
        ConfigError: the first setting that is wrong: flag, value, what would be right.
    """
    resolve_blends(config.data)
    _check_required(config)
    _check_ranges(config)
    _check_layout(config, world_size)
    _fill_in(config, world_size)
    _check_experts(config, world_size)
    for further in (_check_batch, _check_schedule, _check_objective, _check_heads, _check_data, _check_checkpoint):
        further(config)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_required(config: Config) -> None:
    needed = (
        (config.model, ("num_layers", "hidden_size", "num_attention_heads", "seq_length")),
        (config.training, ("micro_batch_size", "train_iters")),
        (config.optimizer, ("lr",)),
        (config.data, ("tokenizer_type",)),
    )
    missing = [name for group, names in needed for name in names if getattr(group, name) is None]
    flags = " ".join("--" + name.replace("_", "-") for name in missing)
    _require(not missing, f"these settings are needed and were not given: {flags}")


def _check_ranges(config: Config) -> None:
    positive = (
        (
            config.model,
            ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
        ),
        (
            config.model,
            ("seq_length", "kv_channels", "max_position_embeddings", "make_vocab_size_divisible_by"),
        ),
        (config.model, ("norm_epsilon", "vocab_size", "rotary_base")),
        (config.model, ("mtp_num_layers", "num_experts", "moe_ffn_hidden_size", "moe_router_topk")),
        (config.parallel, ("expert_model_parallel_size",)),
        (
            config.parallel,
            ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        ),
        (config.parallel, ("num_layers_per_virtual_pipeline_stage", "distributed_timeout_minutes")),
        (config.training, ("micro_batch_size", "global_batch_size", "train_iters", "exit_interval")),
        (config.checkpoint, ("save_interval",)),
        (config.logging, ("log_interval", "eval_interval")),
        (config.optimizer, ("adam_eps",)),
        (config.objective, ("slm_gumbel_temperature",)),
        (config.model, ("slm_logit_softcap",)),
    )
    not_negative = (
        (
            config.optimizer,
            ("lr", "min_lr", "lr_warmup_iters", "lr_warmup_init", "weight_decay", "clip_grad"),
        ),
        (config.logging, ("eval_iters",)),
        (config.model, ("moe_aux_loss_coeff", "moe_z_loss_coeff", "mtp_loss_scaling_factor")),
        (config.data, ("num_workers",)),
        (config.training, ("seed",)),
        (config.objective, ("slm_selection_ratio_warmup_iters", "slm_kept_logits_mb", "slm_z_loss")),
    )
    shares = (
        (config.model, ("attention_dropout", "hidden_dropout", "rotary_percent")),
        (config.optimizer, ("adam_beta1", "adam_beta2", "lr_warmup_fraction")),
        (config.objective, ("slm_mix",)),
    )
    _check_each(positive, lambda value: value > 0, "above 0")
    _check_each(not_negative, lambda value: value >= 0, "0 or more")
    _check_each(shares, lambda value: 0 <= value <= 1, "in [0, 1]")
    ratios = ((config.objective, ("slm_selection_ratio", "slm_selection_ratio_start")),)
    _check_each(ratios, lambda value: 0 < value <= 1, "in (0, 1], for example 0.6 (the paper's for 1B)")


def _check_each(
    groups: tuple[tuple[object, tuple[str, ...]], ...], holds: Callable[[float], bool], wanted: str
) -> None:
    for group, names in groups:
        for name in names:
            value = getattr(group, name)
            fine = value is None or (math.isfinite(value) and holds(value))
            _require(fine, f"--{name.replace('_', '-')} is {value}, and must be {wanted}.")


def _divides(divisor: int, divisor_flag: str, size: int, size_flag: str) -> None:
    _require(
        size % divisor == 0,
        f"{divisor_flag} {divisor} does not divide {size_flag} {size}. Choose a divisor of {size}.",
    )


def _check_layout(config: Config, world_size: int) -> None:
    model, parallel = config.model, config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    tensor_flag, pipeline_flag = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
    context = parallel.context_parallel_size
    shared = f" x --context-parallel-size {context}" if context > 1 else ""
    _require(
        world_size % (tensor * pipeline * context) == 0,
        f"{world_size} processes were started, which is not a multiple of {tensor_flag} {tensor} x {pipeline_flag} "
        f"{pipeline}{shared} = {tensor * pipeline * context}. Start a multiple of that (torchrun --nproc-per-node).",
    )
    length = model.seq_length or 1
    _require(
        context == 1 or length % (2 * context) == 0,
        f"--context-parallel-size {context} cuts each sample into {2 * context} parts, and --seq-length {length} is "
        "no multiple of that.",
    )
    heads, layers = model.num_attention_heads or 1, model.num_layers or 1
    _divides(tensor, tensor_flag, heads, "--num-attention-heads")
    if model.group_query_attention:
        _require(
            model.num_query_groups is not None,
            "--group-query-attention needs --num-query-groups, the key/value heads.",
        )
        groups = model.num_query_groups or 1
        _divides(groups, "--num-query-groups", heads, "--num-attention-heads")
        _divides(tensor, tensor_flag, groups, "--num-query-groups")
    _require(
        model.group_query_attention or model.num_query_groups is None,
        "--num-query-groups has no effect without --group-query-attention.",
    )
    if model.kv_channels is None:
        _divides(heads, "--num-attention-heads", model.hidden_size or 1, "--hidden-size")
    _divides(pipeline, pipeline_flag, layers, "--num-layers")
    if (per_stage := parallel.num_layers_per_virtual_pipeline_stage) is not None:
        flag = "--num-layers-per-virtual-pipeline-stage"
        _require(pipeline > 1, f"{flag} needs {pipeline_flag} above 1.")
        _divides(per_stage, flag, layers // pipeline, "layers per pipeline rank, --num-layers / PP =")
        _require(per_stage < layers // pipeline, f"{flag} {per_stage} leaves one stage per rank: leave it out.")
    if parallel.sequence_parallel:
        _require(tensor > 1, f"--sequence-parallel needs {tensor_flag} above 1.")
        _divides(tensor, tensor_flag, length // context, "--seq-length" if context == 1 else "--seq-length / CP =")


def _check_experts(config: Config, world_size: int) -> None:
    model, parallel = config.model, config.parallel
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    if model.num_experts is None:
        given = [
            flag
            for flag, is_given in (
                ("--expert-model-parallel-size", expert > 1),
                ("--moe-ffn-hidden-size", model.moe_ffn_hidden_size is not None),
                ("--moe-aux-loss-coeff", model.moe_aux_loss_coeff > 0),
                ("--moe-z-loss-coeff", model.moe_z_loss_coeff is not None),
                ("--moe-grouped-gemm", model.moe_grouped_gemm),
            )
            if is_given
        ]
        _require(not given, f"{' '.join(given)} has no effect without --num-experts.")
        return
    _require(
        model.moe_router_topk <= model.num_experts,
        f"--moe-router-topk {model.moe_router_topk} is more than --num-experts {model.num_experts}.",
    )
    _divides(expert, "--expert-model-parallel-size", model.num_experts, "--num-experts")
    ranks = world_size // (tensor * parallel.pipeline_model_parallel_size)
    _divides(expert, "--expert-model-parallel-size", ranks, "ranks that hold the same layers, CP x DP =")
    _require(
        tensor == 1 or parallel.sequence_parallel,
        "--num-experts with --tensor-model-parallel-size above 1 needs --sequence-parallel.",
    )
    _require(
        tensor == 1 or model.disable_bias_linear,
        "--num-experts with --tensor-model-parallel-size above 1 needs --disable-bias-linear.",
    )
    _require(
        not model.moe_grouped_gemm or model.transformer_impl != "local",
        "--moe-grouped-gemm needs --transformer-impl transformer_engine.",
    )


def _fill_in(config: Config, world_size: int) -> None:
    parallel, training = config.parallel, config.training
    sharing = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    ranks = world_size // (sharing * parallel.context_parallel_size)
    if training.global_batch_size is None:
        training.global_batch_size = (training.micro_batch_size or 1) * ranks
    if config.model.max_position_embeddings is None:
        config.model.max_position_embeddings = config.model.seq_length
    step = (training.micro_batch_size or 1) * ranks
    _require(
        training.global_batch_size % step == 0,
        f"--global-batch-size {training.global_batch_size} is not a multiple of --micro-batch-size "
        f"{training.micro_batch_size} x {ranks} data-parallel ranks = {step}.",
    )
    micro_batches = training.global_batch_size // step
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        _require(
            micro_batches % parallel.pipeline_model_parallel_size == 0,
            f"the interleaved schedule needs a multiple of --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size} micro-batches a step, and there are {micro_batches}. "
            "Change --global-batch-size.",
        )


def _check_batch(config: Config) -> None:
    model, training, parallel = config.model, config.training, config.parallel
    _require(
        (model.seq_length or 0) <= (model.max_position_embeddings or 0),
        f"--seq-length {model.seq_length} is longer than --max-position-embeddings {model.max_position_embeddings}.",
    )
    _require(
        not parallel.overlap_param_gather or (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce),
        "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce.",
    )
    _require(
        not parallel.use_distributed_optimizer or config.optimizer.optimizer != "sgd",
        "--use-distributed-optimizer cannot save the state of --optimizer sgd. Leave one of them out.",
    )
    if training.recompute_granularity == "full":
        _require(
            training.recompute_method is not None and training.recompute_num_layers is not None,
            "--recompute-granularity full needs --recompute-method and --recompute-num-layers.",
        )


def _check_schedule(config: Config) -> None:
    own = config.optimizer
    iterations = config.training.train_iters or 1
    _require(own.min_lr <= (own.lr or 0), f"--min-lr {own.min_lr} is above --lr {own.lr}.")
    _require(own.lr_warmup_init <= (own.lr or 0), f"--lr-warmup-init {own.lr_warmup_init} is above --lr {own.lr}.")
    _require(
        own.lr_warmup_fraction is None or own.lr_warmup_iters == 0,
        "--lr-warmup-iters and --lr-warmup-fraction were both given. Give one.",
    )
    decay = own.lr_decay_iters or iterations
    _require(
        own.lr_warmup_iters < decay,
        f"--lr-warmup-iters {own.lr_warmup_iters} is not below the {decay} steps of the schedule.",
    )
    if own.lr_decay_style == "WSD":
        _require(own.lr_wsd_decay_iters is not None, "--lr-decay-style WSD needs --lr-wsd-decay-iters.")
    _require(
        (own.start_weight_decay is None) == (own.end_weight_decay is None),
        "--start-weight-decay and --end-weight-decay belong together: give both or none.",
    )


def _check_objective(config: Config) -> None:
    objective, reference = config.objective, config.reference
    given = [
        name
        for name, unset in (
            ("--slm-selection-ratio-start", objective.slm_selection_ratio_start is None),
            ("--slm-mix", objective.slm_mix == 0),
            ("--slm-mtp-selection", objective.slm_mtp_selection == "main"),
            ("--slm-threshold", objective.slm_threshold == "exact"),
            ("--reference-load", reference.reference_load is None),
            ("--reference-scores", not reference.reference_scores),
        )
        if not unset
    ]
    _require(
        objective.objective == "slm" or not given,
        f"{' '.join(given)} has no effect with --objective clm. Add --objective slm, or leave it out.",
    )
    _require(
        objective.slm_selection_ratio_start is None or objective.slm_selection_ratio_warmup_iters > 0,
        "--slm-selection-ratio-start needs --slm-selection-ratio-warmup-iters.",
    )
    _require(
        objective.slm_threshold == "exact" or objective.slm_scope == "global-batch",
        f"--slm-threshold carried selects over the global batch, and --slm-scope is {objective.slm_scope}. "
        "Add --slm-scope global-batch, or leave it out.",
    )
    if reference.reference_load is not None:
        _require(
            Path(reference.reference_load).is_dir(),
            f"--reference-load {reference.reference_load}: there is no such folder. Give the --save folder of a "
            "reference model that was trained with --objective clm.",
        )
    _check_sidecars(config.reference)


def _check_heads(config: Config) -> None:
    objective, parallel = config.objective, config.parallel
    heads = config.model.mtp_num_layers
    _require(
        objective.slm_mtp_selection == "main" or (heads is not None and objective.slm_scope != "global-batch"),
        "--slm-mtp-selection own needs --mtp-num-layers, and any --slm-scope but global-batch.",
    )
    _require(
        heads is None or parallel.pipeline_model_parallel_size == 1 or config.model.untie_embeddings_and_output_weights,
        "--mtp-num-layers with --pipeline-model-parallel-size above 1 needs --untie-embeddings-and-output-weights: "
        "Megatron-Core cannot save a tied embedding there.",
    )
    _require(
        heads is None or heads < (config.model.seq_length or 1),
        f"--mtp-num-layers {heads} leaves no token of a sample of --seq-length {config.model.seq_length}.",
    )


def _check_sidecars(reference: ReferenceConfig) -> None:
    names = reference.reference_scores
    _require(
        not names or reference.reference_load is None,
        "--reference-load and --reference-scores were both given. Give one: the model, or its scores.",
    )
    twice = next((name for name in names if names.count(name) > 1), None)
    _require(twice is None, f"--reference-scores names {twice} twice. Name each sidecar once.")
    for name in names:
        _require(
            not name.endswith((".scores", "/")),
            f"--reference-scores {name}: give the name alone. NAME stands for CORPUS.NAME.scores beside every corpus.",
        )
    _require(
        len(names) > 1 or reference.reference_combine == "mean",
        f"--reference-combine {reference.reference_combine} has no effect without two or more --reference-scores.",
    )


def _check_data(config: Config) -> None:
    data = config.data
    _require(bool(data.data_path or data.train_data_path), "no corpus to train on: give --data-path.")
    _require(data.split is None or not data.train_data_path, "--split has no effect with --train-data-path.")
    _require(
        not (data.data_path and data.train_data_path),
        "--data-path and --train-data-path were both given. Give one.",
    )


def _check_checkpoint(config: Config) -> None:
    own = config.checkpoint
    _require(own.save is not None or own.save_interval is None, "--save-interval needs --save, a folder.")
    _require(own.load is not None or not own.finetune, "--finetune needs --load, the weights to begin from.")
    folders = (
        ("--save", own.save),
        ("--tensorboard-dir", config.logging.tensorboard_dir),
        ("--data-cache-path", config.data.data_cache_path),
    )
    for flag, folder in folders:
        if folder is not None:
            _check_writable(flag, Path(folder))
    if config.logging.slm_metrics_file is not None:
        _check_writable("--slm-metrics-file", Path(config.logging.slm_metrics_file).parent)


def _check_writable(flag: str, folder: Path) -> None:
    """Try it: permission bits say nothing of read-only mounts, of full disks, and of what root may do."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    _require(place.is_dir(), f"{flag} {folder}: {place} is a file, not a folder.")
    try:
        with tempfile.TemporaryDirectory(prefix=".writable-", dir=place):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} {folder}: {place} cannot be written ({error.strerror}). Give a folder on a disk with room that "
            "this user may write."
        ) from error
