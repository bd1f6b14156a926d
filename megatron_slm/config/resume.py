"""Settings on resume: one table defines the consequence of each difference between flags and checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from megatron_slm.config.activation import activation_name
from megatron_slm.config.constraints import flag_name
from megatron_slm.config.recipe import settings, to_flat_dict, with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import refuse


class Rule(Enum):
    """Consequence of a setting that differs from the checkpoint's."""

    STRUCTURE = auto()  # an error, also for a run that starts from the weights, which would not fit
    ERROR = auto()  # an error for a resumed run; a run that starts from the weights (--finetune) uses the flag
    SCHEDULE = auto()  # an error, unless --override-... or --use-checkpoint-opt_param-scheduler is given
    OPTIMIZER = auto()  # an error if the optimizer state is loaded; otherwise uses the flag
    FLAG = auto()  # uses the flag and prints the difference
    CHECKPOINT = auto()  # uses the checkpoint: the setting has no effect after the first step
    STATE = auto()  # ignores the flag if the optimizer state is loaded, which holds the current value
    LOCAL = auto()  # specific to this start of the run; not compared


_TABLE: dict[Rule, tuple[str, ...]] = {
    Rule.STRUCTURE: (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention"),
        *("num_query_groups", "kv_channels", "position_embedding_type", "normalization", "swiglu"),
        *("activation", "apply_layernorm_1p"),
        *("disable_bias_linear", "add_qkv_bias", "untie_embeddings_and_output_weights", "qk_layernorm"),
        *("num_experts", "moe_ffn_hidden_size"),
    ),
    Rule.ERROR: (
        *("seq_length", "rotary_base", "rotary_percent", "norm_epsilon", "slm_logit_softcap", "mtp_num_layers"),
        *("moe_router_topk", "moe_router_pre_softmax"),
        *("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor"),
    ),
    Rule.SCHEDULE: (
        *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_fraction"),
        *("lr_warmup_init", "lr_wsd_decay_style", "lr_wsd_decay_iters", "weight_decay", "start_weight_decay"),
        *("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"),
        *("end_weight_decay", "weight_decay_incr_style"),
    ),
    Rule.OPTIMIZER: ("optimizer",),
    Rule.FLAG: (
        *("max_position_embeddings", "attention_dropout", "hidden_dropout", "make_vocab_size_divisible_by"),
        *("vocab_size", "attention_softmax_in_fp32", "mtp_loss_scaling_factor", "moe_router_load_balancing_type"),
        *("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_token_dispatcher_type", "moe_grouped_gemm"),
        *("transformer_impl", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
        *("context_parallel_size", "expert_model_parallel_size", "num_layers_per_virtual_pipeline_stage"),
        *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        *("sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"),
        *("align_grad_reduce", "align_param_gather", "overlap_p2p_comm", "overlap_p2p_comm_warmup_flush"),
        *("tp_comm_overlap", "fp8_format", "fp8_recipe", "fp8_param_gather", "fp8_margin", "fp8_amax_history_len"),
        *("fp8_amax_compute_algo", "fp8_wgrad", "first_last_layers_bf16", "num_layers_at_start_in_bf16"),
        *("num_layers_at_end_in_bf16", "fp16", "loss_scale", "min_loss_scale"),
        *("loss_scale_window", "hysteresis", "use_precision_aware_optimizer", "main_grads_dtype"),
        *("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"),
        *("micro_batch_size", "global_batch_size", "rampup_batch_size", "train_iters", "train_samples", "seed", "bf16"),
        *("recompute_granularity", "recompute_method", "recompute_num_layers", "gradient_accumulation_fusion"),
        *("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad"),
        "accumulate_allreduce_grads_in_fp32",
        *("check_for_spiky_loss", "check_for_large_grads"),
        *("slm_spike_window", "slm_spike_threshold", "slm_spike_action", "iterations_to_skip"),
        *("data_order", "slm_sentences", "mock_data", "slm_loss_mask"),
        *("data_path", "train_data_path", "valid_data_path", "data_args_path", "per_split_data_args_path", "split"),
        *("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file"),  # fingerprints are compared elsewhere
        *("tiktoken_pattern", "tiktoken_num_special_tokens", "eod_id", "null_tokenizer_eod_id"),
        *("reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
        *("objective", "slm_selection_ratio", "slm_score", "slm_scope", "slm_threshold"),
        *("slm_selection_ratio_start", "slm_selection_ratio_warmup_iters", "slm_mix", "slm_mtp_selection"),
        *("slm_selection_ratio_warmup_tokens", "slm_selection_ratio_style", "slm_selection_ratio_levels"),
        *("slm_corpus_ratios", "slm_ratio_gain", "slm_ratio_min", "slm_ratio_max"),
        "slm_weight_temperature",
        *("slm_gumbel_temperature", "slm_cross_entropy", "slm_exact_mode", "slm_backward", "slm_z_loss"),
        "slm_saved_logits_mb",
        *("reference_load", "reference_ckpt_step", "reference_precision", "reference_scores", "reference_combine"),
        *("reference_corpora", "reference_fp8", "reference_in_bubbles"),
        *("reference_history", "reference_average_decay", "reference_refresh_interval"),
    ),
    Rule.CHECKPOINT: ("init_method_std",),
    Rule.STATE: ("initial_loss_scale",),
    Rule.LOCAL: (
        *("distributed_backend", "distributed_timeout_minutes", "tp_comm_overlap_cfg", "tp_comm_bootstrap_backend"),
        *("slm_hang_timeout", "log_straggler", "slm_straggler_factor"),
        *("exit_interval", "exit_duration_in_mins", "exit_signal_handler", "skip_train", "replay_step"),
        "require_fused",
        *("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"),
        *("data_cache_path", "num_workers", "full_validation", "slm_accept_changed_corpora"),
        *("save", "load", "pretrained_checkpoint", "save_interval", "save_retain_interval", "finetune", "ckpt_step"),
        *("keep_last", "async_save"),
        *("save_optim", "save_rng", "load_optim", "load_rng", "exit_on_missing_checkpoint", "use_checkpoint_args"),
        *("slm_verify_checksums", "slm_overwrite_save", "trust_checkpoint"),
        *("log_interval", "eval_interval", "eval_iters", "tensorboard_dir"),
        *("eval_tasks", "tasks_dir", "eval_tasks_limit"),
        *("wandb_project", "wandb_exp_name", "wandb_save_dir", "slm_log_dir", "slm_metrics_file"),
        *("slm_events_file", "replay_report"),
        *("profile", "profile_step_start", "profile_step_end", "profile_ranks", "use_pytorch_profiler"),
        *("pytorch_profiler_collect_shapes", "pytorch_profiler_collect_callstack"),
        *("record_memory_history", "memory_snapshot_path"),
        *("flight_recorder_dump_path", "flight_recorder_trace_buffer_size", "flight_recorder_dump_on_timeout"),
        *("flight_recorder_include_stack_trace", "flight_recorder_include_only_active"),
        *("flight_recorder_extra_dump_on_exec", "manual_gc", "manual_gc_interval", "manual_gc_eval"),
    ),
}
RULES: dict[str, Rule] = {name: rule for rule, names in _TABLE.items() for name in names}

# Settings that determine the scores to which a saved threshold applies.
SCORE_SETTINGS: tuple[str, ...] = (
    "objective",
    "slm_score",
    "slm_scope",
    "slm_gumbel_temperature",
    "reference_load",
    "reference_ckpt_step",
    "reference_precision",
    "reference_fp8",
    "reference_scores",
    "reference_combine",
    "reference_corpora",
    "reference_history",
    "reference_average_decay",
    "reference_refresh_interval",
)
# Settings that determine the tokens of the loss and their weights; the estimate of spikes holds for these only.
LOSS_SETTINGS: tuple[str, ...] = (
    *SCORE_SETTINGS,
    *("slm_selection_ratio", "slm_selection_ratio_start", "slm_selection_ratio_warmup_iters"),
    *("slm_selection_ratio_warmup_tokens", "slm_selection_ratio_style", "slm_selection_ratio_levels"),
    *("slm_corpus_ratios", "slm_weight_temperature", "slm_mix", "slm_backward", "slm_loss_mask"),
)
REFERENCE_PATHS = ("reference_load", "reference_ckpt_step")  # of a model, which may be moved
DERIVED = {"ffn_hidden_size", "kv_channels", "num_query_groups", "moe_ffn_hidden_size"}  # may be derived from others


@dataclass(frozen=True)
class Difference:
    """Represent a setting whose value differs from the checkpoint's."""

    name: str
    flag: str
    ours: Any
    theirs: Any
    rule: Rule


def differences(config: RunConfig, saved: RunConfig) -> list[Difference]:
    """Return the differing settings that have an effect, except local ones, in the order of the help."""
    current, earlier = to_flat_dict(config), to_flat_dict(saved)
    found = []
    for _, setting, _ in settings():
        name, rule = setting.name, RULES.get(setting.name, Rule.FLAG)
        ours, theirs = current[name], earlier[name]
        follows = name in DERIVED and (None in (ours, theirs) or _sources(config) != _sources(saved))
        if rule is not Rule.LOCAL and ours != theirs and not follows and _has_effect(name, config, saved):
            found.append(Difference(name, flag_name(setting), ours, theirs, rule))
    return found


def reconcile(
    config: RunConfig, saved: RunConfig, directory: Path, flag: str, additional: Sequence[str] = ()
) -> tuple[RunConfig, str]:
    """Apply the table to a run that resumes from ``directory``.

    Args:
        additional: descriptions of differences outside the settings, for the log line.

    Returns:
        The configuration with the settings adopted from the checkpoint, and a log line with all differences, empty if
        there are none.

    Raises:
        ConfigError: one message with all differences that are errors, each with its remedy.
    """
    found = differences(config, saved)
    refused = {Rule.STRUCTURE, Rule.ERROR} | ({Rule.OPTIMIZER} if config.checkpoint.load_optim else set())
    refuse([_refusal(each, directory, flag) for each in found if each.rule in refused])
    adopted = {Rule.CHECKPOINT} | ({Rule.STATE} if config.checkpoint.load_optim else set())
    if config.optimizer.use_checkpoint_opt_param_scheduler and config.checkpoint.load_optim:
        adopted.add(Rule.SCHEDULE)
    values = {each.name: each.theirs for each in found if each.rule in adopted}
    if Rule.SCHEDULE in adopted:
        values |= _fixed_decay(with_settings(config, values), saved)
    return with_settings(config, values), _line(found, adopted, directory, additional)


def check_weights_fit(config: RunConfig, saved: RunConfig, directory: Path, flag: str) -> str:
    """Apply the table to a run that starts from the weights in ``directory``; return the log line.

    Raises:
        ConfigError: settings that determine the shapes of the weights differ.
    """
    found = [each for each in differences(config, saved) if each.rule in (Rule.STRUCTURE, Rule.ERROR)]
    refuse(
        [
            f"{flag}: {each.flag} {show(each.ours)} differs from the model in {directory} ({show(each.theirs)}), "
            f"whose weights do not fit. {_remedy(each)}, or add --use-checkpoint-args."
            for each in found
            if each.rule is Rule.STRUCTURE
        ]
    )
    return _line(found, set(), directory)


def score_changed(config: RunConfig, saved: RunConfig, *, same_reference: bool = False) -> bool:
    """Return whether the scores of the run are incomparable with those of the checkpoint.

    Args:
        same_reference: the reference models are known to be the same, wherever they are.
    """
    return _has_changed(SCORE_SETTINGS, config, saved, same_reference)


def loss_changed(config: RunConfig, saved: RunConfig, *, same_reference: bool = False) -> bool:
    """Return whether the loss of the run is a sum over other tokens, or has other weights, than the checkpoint's.

    Args:
        same_reference: the reference models are known to be the same, wherever they are.
    """
    return _has_changed(LOSS_SETTINGS, config, saved, same_reference)


def _has_changed(names: Sequence[str], config: RunConfig, saved: RunConfig, same_reference: bool) -> bool:
    moved = REFERENCE_PATHS if same_reference else ()
    return any(each.name in names and each.name not in moved for each in differences(config, saved))


def _refusal(each: Difference, directory: Path, flag: str) -> str:
    remedy = _remedy(each)
    if each.rule is Rule.OPTIMIZER:
        remedy += ", or add --no-load-optim to start with a new optimizer state"
    elif each.rule is Rule.ERROR:
        remedy += ", add --use-checkpoint-args, or start a new run from the weights with --finetune"
    else:
        remedy += ", or add --use-checkpoint-args"
    values = f"{show(each.ours)} differs from the checkpoint {directory} ({show(each.theirs)})"
    return f"{flag}: {each.flag} {values}. {remedy}."


def _remedy(each: Difference) -> str:
    """Return the instruction to give the flag as the checkpoint has it."""
    if each.theirs is None:
        return f"Leave {each.flag} out"
    if isinstance(each.theirs, bool):
        return f"Give {each.flag if each.theirs else each.flag.replace('--', '--no-', 1)}"
    return f"Give {each.flag} {show(each.theirs)}"


def _line(found: list[Difference], adopted: set[Rule], directory: Path, additional: Sequence[str] = ()) -> str:
    if not found and not additional:
        return ""
    shown = [_shown(each, each.rule in adopted) for each in found]
    return f"differences from {directory}: {'; '.join([*shown, *additional])}"


def _shown(each: Difference, is_adopted: bool) -> str:
    if not is_adopted:
        return f"{each.flag} {show(each.theirs)} -> {show(each.ours)}"
    kept = "the current one of the checkpoint" if each.rule is Rule.STATE else show(each.theirs)
    return f"{each.flag} {show(each.ours)} ignored, {kept} kept"


def show(value: Any) -> str:
    """Format a value of a setting for a message."""
    if isinstance(value, dict):
        return " ".join(f"{name}={' '.join(blend)}" for name, blend in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "unset", True: "on", False: "off"}[value]
    return str(value)


def _has_effect(name: str, config: RunConfig, saved: RunConfig) -> bool:
    if config.training.skip_train and (RULES[name] is Rule.SCHEDULE or name in ("train_iters", "train_samples")):
        return False
    if name == "initial_loss_scale":
        return all(run.training.fp16 and run.precision.has_dynamic_loss_scale for run in (config, saved))
    if name in ("swiglu", "activation"):
        return activation_name(config.model) != activation_name(saved.model)
    if name in ("group_query_attention", "num_query_groups"):
        return _query_groups(config) != _query_groups(saved)
    if name == "rope_scaling_factor" and not (config.model.use_rope_scaling or saved.model.use_rope_scaling):
        return False
    if name.startswith(("rotary_", "rope_", "use_rope_")):
        return config.model.position_embedding_type == "rope"
    return not name.startswith("moe_router_") or config.model.num_experts is not None


def _query_groups(config: RunConfig) -> int | None:
    """Return the number of key/value heads."""
    model = config.model
    return model.num_query_groups if model.group_query_attention else model.num_attention_heads


def _sources(config: RunConfig) -> tuple[Any, ...]:
    """Return the settings from which others are derived; a difference in them is reported instead of its effects."""
    return config.model.hidden_size, config.model.num_attention_heads, activation_name(config.model)


def _fixed_decay(config: RunConfig, saved: RunConfig) -> dict[str, Any]:
    """Return the length of a schedule without an explicit length: that of the checkpoint's run, not of a longer one."""
    if saved.training.train_samples is not None:
        return {"lr_decay_samples": config.optimizer.lr_decay_samples or saved.training.train_samples}
    if config.optimizer.lr_decay_iters is None:
        return {"lr_decay_iters": saved.training.train_iters}
    return {}
