"""Flags of the layout and of the checkpoint, for commands that run a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import isnan
from typing import TYPE_CHECKING, Any

from megatron_slm.config.schema import ParallelConfig
from megatron_slm.config.schema.training import PARAMS_DTYPES
from megatron_slm.mcore.pickle_classes import trust_checkpoints
from megatron_slm.runtime.errors import refuse

if TYPE_CHECKING:
    from megatron_slm.runtime.groups import Groups


def add_layout_flags(add: Callable[..., argparse.Action]) -> None:
    """Add the flags of the parallel layout and of communication, with the trainer's names."""
    add("--tensor-model-parallel-size", type=int, default=1, help="degree of tensor model parallelism")
    add("--pipeline-model-parallel-size", type=int, default=1, help="degree of pipeline model parallelism")
    add("--expert-model-parallel-size", type=int, default=1, help="degree of expert model parallelism")
    add(
        "--distributed-backend",
        choices=("nccl", "gloo"),
        help="backend of torch.distributed; default nccl on GPUs, gloo on CPUs",
    )
    add("--distributed-timeout-minutes", type=int, default=10, help="timeout in minutes of collective operations")
    add(
        "--slm-hang-timeout",
        type=float,
        default=ParallelConfig().slm_hang_timeout,
        help="seconds without progress of a rank that scores tokens after which all ranks end; 0 disables this",
    )


class _Trust(argparse.Action):
    """Accept all classes in the pickles of checkpoints."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        setattr(namespace, self.dest, True)
        trust_checkpoints(True)


def add_checkpoint_flags(add: Callable[..., argparse.Action]) -> None:
    """Add the flags that choose the checks of a checkpoint before it is loaded."""
    add(
        "--slm-verify-checksums",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="verify the checksums of the checkpoint before use",
    )
    add(
        "--trust-checkpoint",
        action=_Trust,
        nargs=0,
        default=False,
        help="unpickle any class in the checkpoint, which can run code of its author; default only classes of data",
    )


def add_model_flags(add: Callable[..., argparse.Action]) -> None:
    """Add the flags that choose the iteration and the precision of the model."""
    add("--ckpt-step", type=int, help="checkpoint iteration; default the newest")
    add("--precision", choices=PARAMS_DTYPES, help="precision of the model; default that of its training run")


def given_layout(arguments: argparse.Namespace) -> ParallelConfig:
    """Return the layout of the command line.

    Raises:
        ConfigError: a size is not positive, or a time is negative.
    """
    sizes = {
        name: getattr(arguments, name)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    }
    problems = [
        f"--{name.replace('_', '-')} is {size}, and must be above 0." for name, size in sizes.items() if size < 1
    ]
    if arguments.slm_hang_timeout < 0 or isnan(arguments.slm_hang_timeout):
        problems.append(f"--slm-hang-timeout is {arguments.slm_hang_timeout:g}, and must be at least 0.")
    refuse(problems)
    return ParallelConfig(**sizes)


def start_ranks(parallel: ParallelConfig, arguments: argparse.Namespace) -> Groups:
    """Join the process group in the layout of the command line. Collective over all ranks.

    Raises:
        ConfigError: the number of processes does not fit the layout.
    """
    from megatron_slm.runtime import process
    from megatron_slm.runtime.groups import ParallelLayout

    return process.start(
        ParallelLayout(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            expert=parallel.expert_model_parallel_size,
        ),
        backend=arguments.distributed_backend,
        timeout_minutes=arguments.distributed_timeout_minutes,
        hang_timeout=arguments.slm_hang_timeout,
    )
