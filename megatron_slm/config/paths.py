"""Path settings: defaults of record files, and expansion of ``~`` in recipes and ``--flag=`` arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_slm.config.schema import RunConfig

METRICS_FILE = "metrics.jsonl"
TOKENIZER_DIRECTORY = "tokenizer"  # in the directory of an imported model
EVENTS_FILE = "events.jsonl"
STOP_FILE = "slm_stopped"  # in --save: reason why the run stopped before its end
PATH_SETTINGS = frozenset(
    {
        *("data_path", "train_data_path", "valid_data_path", "data_args_path", "per_split_data_args_path"),
        *("data_cache_path", "tokenizer_model", "vocab_file", "merge_file", "save", "load", "pretrained_checkpoint"),
        *("tensorboard_dir", "wandb_save_dir", "slm_log_dir", "slm_metrics_file", "slm_events_file", "replay_report"),
        *("reference_load", "reference_scores", "tasks_dir", "tp_comm_overlap_cfg"),
        *("memory_snapshot_path", "flight_recorder_dump_path", "slm_corpus_ratios", "reference_corpora"),
    }
)
PATH_LISTS = frozenset({"reference_load"})  # lists of paths, of which a recipe may hold a single one as text


def metrics_file(config: RunConfig) -> Path | None:
    """Return the path of the JSONL metrics file, or None if metrics are not written."""
    if config.logging.slm_metrics_file:
        return Path(config.logging.slm_metrics_file)
    return Path(config.checkpoint.save) / METRICS_FILE if config.checkpoint.save else None


def events_file(config: RunConfig) -> Path | None:
    """Return the path of the JSONL file of spikes and NaN, or None if they are not written."""
    if config.logging.slm_events_file:
        return Path(config.logging.slm_events_file)
    return Path(config.checkpoint.save) / EVENTS_FILE if config.checkpoint.save else None


def expand_user(path: str) -> str:
    """Return a path with a leading ``~`` or ``~user`` replaced by the home directory."""
    return os.path.expanduser(path)  # noqa: PTH111 keeps ~ of an unknown user, for which Path raises RuntimeError


def expand_paths(value: Any) -> Any:
    """Return the value of a path setting with ``~`` expanded, including in blends."""
    if isinstance(value, str):
        return expand_user(value)
    if isinstance(value, list):
        return [expand_paths(path) for path in value]
    if isinstance(value, dict):
        return {name: expand_paths(paths) for name, paths in value.items()}
    return value
