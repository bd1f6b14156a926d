"""Validate the configuration without torch and without reading data."""

from __future__ import annotations

from megatron_slm.config.blends import resolve_blends
from megatron_slm.config.constraints import flag_name, violations
from megatron_slm.config.recipe import settings
from megatron_slm.config.relations import relation_violations
from megatron_slm.config.relations.wording import data_parallel_size
from megatron_slm.config.schema import Config
from megatron_slm.runtime.errors import refuse

REQUIRED = (
    *("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "train_iters", "lr"),
    "tokenizer_type",
)


def check(config: Config, world_size: int) -> None:
    """Fill in settings that follow from others, then refuse a configuration that cannot work.

    Args:
        world_size: number of started processes.

    Raises:
        ConfigError: all violations that were found: flag, value, remedy.
    """
    resolve_blends(config.data)
    refuse([*_missing(config), *value_violations(config)])
    _fill_in(config, world_size)
    refuse(relation_violations(config, world_size))


def value_violations(config: Config) -> list[str]:
    """Return the messages of all settings that are outside their own constraints."""
    return [
        message
        for group, setting, _ in settings()
        for message in violations(setting, getattr(getattr(config, group), setting.name))
    ]


def _missing(config: Config) -> list[str]:
    needed = set(REQUIRED) - ({"train_iters", "lr"} if config.training.skip_train else set())
    unset = [
        flag_name(setting)
        for group, setting, _ in settings()
        if setting.name in needed and getattr(getattr(config, group), setting.name) is None
    ]
    if config.training.train_samples is not None and "--train-iters" in unset:
        unset.remove("--train-iters")
    return [f"these settings are needed and were not given: {' '.join(unset)}"] if unset else []


def _fill_in(config: Config, world_size: int) -> None:
    training, model, parallel = config.training, config.model, config.parallel
    if parallel.tensor_model_parallel_size == 1:
        parallel.sequence_parallel = False  # nothing to split, as in Megatron-LM
    if training.global_batch_size is None:
        training.global_batch_size = (training.micro_batch_size or 1) * max(1, data_parallel_size(config, world_size))
    if training.train_samples is not None and training.train_iters is None:
        training.train_iters = training.train_samples // training.global_batch_size
    if training.skip_train:  # the optimizer state is not needed; a learning rate and a length are, to build it
        config.checkpoint.load_optim = config.checkpoint.load_rng = False
        training.train_iters, config.optimizer.lr = training.train_iters or 1, config.optimizer.lr or 0.0
    if model.max_position_embeddings is None:
        model.max_position_embeddings = model.seq_length
