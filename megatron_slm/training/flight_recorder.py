"""NCCL flight recorder: the latest collectives of each rank, written if one exceeds the timeout."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.files import explained_write

DIRECTORY = "flight_recorder"  # in --save


def record_collectives(config: RunConfig) -> None:
    """Configure the flight recorder of an NCCL run, before the process group exists.

    Variables of the environment have precedence over flags, as in Megatron-LM.
    """
    if uses_nccl(config):
        for name, value in variables(config).items():
            os.environ.setdefault(name, value)


def uses_nccl(config: RunConfig) -> bool:
    """Return whether the run communicates over NCCL."""
    backend = config.parallel.distributed_backend
    return backend == "nccl" or (backend is None and torch.cuda.is_available())


def variables(config: RunConfig) -> dict[str, str]:
    """Return the environment variables that configure torch's flight recorder."""
    settings = config.diagnostics
    found = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(settings.flight_recorder_trace_buffer_size),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": str(int(settings.flight_recorder_dump_on_timeout)),
        "TORCH_INCLUDE_STACK_TRACE": str(int(settings.flight_recorder_include_stack_trace)),
        "TORCH_INCLUDE_ONLY_ACTIVE": str(int(settings.flight_recorder_include_only_active)),
        "TORCH_NCCL_EXTRA_DUMP_ON_EXEC": str(int(settings.flight_recorder_extra_dump_on_exec)),
    }
    prefix = dump_prefix(config)
    if prefix is not None:
        found |= {"TORCH_FR_DUMP_TEMP_FILE": prefix, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix}
    return found


def dump_prefix(config: RunConfig) -> str | None:
    """Return the path prefix of the files, to which torch adds the rank; None for torch's default in /tmp.

    Evaluations and replays, which write nothing to --save, have torch's default.
    """
    path, save, training = config.diagnostics.flight_recorder_dump_path, config.checkpoint.save, config.training
    if path is not None:
        return str(Path(path) / "_dump_") if Path(path).is_dir() else path
    if save is None or training.skip_train or training.replay_step is not None:
        return None
    return str(Path(save).absolute() / DIRECTORY / "rank_")


def make_dump_directory(config: RunConfig) -> None:
    """Create the directory of the files of an NCCL run, since torch does not."""
    prefix = dump_prefix(config)
    if prefix is not None and uses_nccl(config):
        with explained_write(prefix, "--flight-recorder-dump-path"):
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
