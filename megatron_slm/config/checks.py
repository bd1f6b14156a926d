"""Validate and resolve the configuration without torch and without reading data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_slm.config.activation import default_ffn_size
from megatron_slm.config.batch_sizes import BatchSizes, ramp_violations
from megatron_slm.config.blends import resolve_blends
from megatron_slm.config.constraints import UNSET, flag_name, violations
from megatron_slm.config.recipe import settings, to_flat_dict, with_settings
from megatron_slm.config.relations import PLAN_RELATIONS, RELATIONS, relation_violations
from megatron_slm.config.relations.wording import data_parallel_size
from megatron_slm.config.schema import RunConfig
from megatron_slm.config.selection import finetuning_settings
from megatron_slm.runtime.errors import ConfigError, refuse


def resolve(config: RunConfig, world_size: int, *, has_files: bool = True) -> RunConfig:
    """Validate the configuration and return it with all derived settings.

    Args:
        world_size: number of started processes.
        has_files: the data and directories of the run are on this machine, and validated.

    Raises:
        ConfigError: one message with all violations, each with flag, value and remedy.
    """
    problems: list[str] = []
    config = _with_default_tokenizer(config)
    try:
        config = replace(config, data=resolve_blends(config.data))
    except ConfigError as error:
        problems.append(str(error))
    refuse([*problems, *_missing(config), *value_violations(config)])
    derived = _derive_run_settings(config, world_size) | finetuning_settings(config)
    config = derive(with_settings(config, derived))
    refuse(relation_violations(config, world_size, RELATIONS if has_files else PLAN_RELATIONS))
    return config


def derive(config: RunConfig) -> RunConfig:
    """Return the configuration with all derived model sizes; also for saved configurations."""
    model = config.model
    if model.hidden_size is UNSET or model.num_attention_heads is UNSET:
        return config
    derived: dict[str, Any] = {}
    if model.ffn_hidden_size is UNSET:
        derived["ffn_hidden_size"] = default_ffn_size(model)
    if model.num_experts is not None and model.moe_ffn_hidden_size is UNSET:
        derived["moe_ffn_hidden_size"] = derived.get("ffn_hidden_size", model.ffn_hidden_size)
    if model.max_position_embeddings is UNSET:
        derived["max_position_embeddings"] = model.seq_length
    if model.kv_channels is UNSET and model.hidden_size % model.num_attention_heads == 0:
        derived["kv_channels"] = model.hidden_size // model.num_attention_heads
    return with_settings(config, derived)


def _with_default_tokenizer(config: RunConfig) -> RunConfig:
    """Select GPT2BPETokenizer if only a vocabulary file is given, as Megatron-LM's pretrain_gpt.py does."""
    tokenizer = config.tokenizer
    if tokenizer.tokenizer_type is not UNSET or tokenizer.vocab_file is None:
        return config
    return with_settings(config, {"tokenizer_type": "GPT2BPETokenizer"})


def value_violations(config: RunConfig) -> list[str]:
    """Return a message for each setting that violates its constraints."""
    values = to_flat_dict(config)
    return [message for _, setting, _ in settings() for message in violations(setting, values[setting.name])]


def _missing(config: RunConfig) -> list[str]:
    training, values = config.training, to_flat_dict(config)
    optional = {"train_iters", "lr"} if training.skip_train else {"train_iters"} if training.train_samples else set()
    unset = {
        flag_name(setting): group
        for group, setting, _ in settings()
        if setting.metadata["required"] and setting.name not in optional and values[setting.name] is UNSET
    }
    remedy = _source_of_model(config) if "model" in unset.values() else ""
    return [f"missing required settings: {' '.join(unset)}{remedy}"] if unset else []


def _source_of_model(config: RunConfig) -> str:
    """Return the way to take missing model settings from the initial checkpoint; empty if there is none."""
    checkpoint = config.checkpoint
    for flag, path in (("--load", checkpoint.load), ("--pretrained-checkpoint", checkpoint.pretrained_checkpoint)):
        if path is None:
            continue
        if not Path(path).is_dir() and path != checkpoint.save:
            return f". {flag} {path}, which could provide them, is not a directory. Correct the path."
        if Path(path).is_dir() and not checkpoint.use_checkpoint_args:
            return f". Add --use-checkpoint-args to take those of the model from {flag} {path}."
    return ""


def _derive_run_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    training, derived = config.training, dict[str, Any]()
    batch, ranks = training.global_batch_size, max(1, data_parallel_size(config, world_size))
    if config.parallel.tensor_model_parallel_size == 1:
        derived["sequence_parallel"] = False  # no effect, as in Megatron-LM
    if batch is UNSET:
        batch = derived["global_batch_size"] = training.micro_batch_size * ranks
    training = replace(training, global_batch_size=batch)
    refuse(list(ramp_violations(training)))
    sizes = BatchSizes.from_config(training)
    if training.train_samples is not None and training.train_iters is UNSET:
        derived["train_iters"] = sizes.steps_until(training.train_samples)
    if training.skip_train:  # building the optimizer still needs a learning rate and a length
        derived |= {"load_optim": False, "load_rng": False}
        derived.setdefault("train_iters", training.train_iters or 1)
        derived["lr"] = config.optimizer.lr or 0.0
    return derived
