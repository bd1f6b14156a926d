"""Paths of the flags: the default of --slm-metrics-file, and ``~``, which a shell leaves in recipes and ``--flag=``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_slm.config.schema import Config

METRICS_FILE = "metrics.jsonl"
PATH_SETTINGS = frozenset(
    {
        *("data_path", "train_data_path", "valid_data_path", "data_args_path", "per_split_data_args_path"),
        *("data_cache_path", "tokenizer_model", "vocab_file", "merge_file", "save", "load", "pretrained_checkpoint"),
        *("tensorboard_dir", "wandb_save_dir", "slm_log_dir", "slm_metrics_file", "reference_load", "reference_scores"),
    }
)


def metrics_file(config: Config) -> Path | None:
    """Return the path of the JSONL file of metrics, if there is one."""
    if config.logging.slm_metrics_file:
        return Path(config.logging.slm_metrics_file)
    return Path(config.checkpoint.save) / METRICS_FILE if config.checkpoint.save else None


def expanded_user(path: str) -> str:
    """Return a path with ``~`` or ``~user`` at its beginning replaced by the home directory."""
    return os.path.expanduser(path)  # noqa: PTH111 leaves ~ of an unknown user, where Path raises RuntimeError


def expanded_paths(value: Any) -> Any:
    """Return the value of a path setting with ``~`` replaced, also in the words of blends."""
    if isinstance(value, str):
        return expanded_user(value)
    if isinstance(value, list):
        return [expanded_paths(word) for word in value]
    if isinstance(value, dict):
        return {name: expanded_paths(words) for name, words in value.items()}
    return value
