"""Overlap of tensor-parallel communication with matrix products (--tp-comm-overlap)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_slm.config.schema import RunConfig
from megatron_slm.mcore.transformer_engine import initialize_user_buffers
from megatron_slm.model.gpt import DTYPES
from megatron_slm.runtime.errors import ConfigError

FLAG = "--tp-comm-overlap-cfg"


def overlap_settings(path: str | None) -> dict[str, Any]:
    """Return the settings of each overlapped operation; empty for Transformer Engine's defaults.

    Raises:
        ConfigError: the file cannot be read, or is not a YAML mapping of operations to settings.
    """
    if path is None:
        return {}
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{FLAG} {path}: the file cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{FLAG} {path}: the file is not valid YAML: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(value, dict) for value in settings.values()):
        raise ConfigError(f"{FLAG} {path}: the file must map operations, such as qkv_fprop, to their settings.")
    return settings


def start_overlap(config: RunConfig) -> None:
    """Allocate the buffers of the overlapped communication, if it is configured. Collective over all ranks."""
    parallel, precision, training = config.parallel, config.precision, config.training
    if not parallel.tp_comm_overlap:
        return
    in_bf16 = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    uses_fp8 = precision.fp8_format is not None
    tokens = training.micro_batch_size * config.model.seq_length // parallel.context_parallel_size
    initialize_user_buffers(
        shape=(tokens, config.model.hidden_size),
        dtype=DTYPES[training.params_dtype],
        tensor_parallel_size=parallel.tensor_model_parallel_size,
        settings=overlap_settings(parallel.tp_comm_overlap_cfg),
        uses_fp8=uses_fp8,
        uses_high_precision=not uses_fp8 or (precision.first_last_layers_bf16 and in_bf16 > 0),
        bootstrap_backend=parallel.tp_comm_bootstrap_backend,
    )
