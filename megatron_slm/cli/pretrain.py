"""Command line of the trainer: ``torchrun ... -m megatron_slm.pretrain``, or a single process without torchrun.

Heavy imports are inside functions, so that ``--help``, flag validation and the helper processes of the checkpoint
format do not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from megatron_slm.checkpoint.adoption import adopt_settings
from megatron_slm.config.flags import parse
from megatron_slm.config.recipe import dump_config
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.kernel_order import order_kernels
from megatron_slm.runtime.launch import Launch, read_launch
from megatron_slm.runtime.output import print_result
from megatron_slm.runtime.reporting import run_command
from megatron_slm.runtime.signals import StopSignals
from megatron_slm.training.policy_checks import policy_warnings
from megatron_slm.training.preflight import (
    check_device,
    check_files,
    check_memory,
    default_device,
    device_obstacles,
    resolve_values,
    slow_products,
    unused_speculation,
)

if TYPE_CHECKING:
    from megatron_slm.runtime.groups import Groups
    from megatron_slm.training.loop import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for a user error, 3 if training diverged."""
    return run_command(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> None:
    command = parse(argv, adopt_settings)
    launch = read_launch() if command.world_size is None else Launch("none", world_size=command.world_size)
    if command.action == "print-config":
        if launch.rank == 0:
            print_result(dump_config(command.config))
        return
    config = resolve_values(command.config, launch.world_size)
    if command.action == "train":
        handles = config.training.exit_signal_handler
        with StopSignals(announces=launch.rank == 0) if handles else nullcontext() as signals:
            _train(config, command.note, signals)
    elif launch.rank == 0:
        print_checked_plan(config, command.note, launch.world_size, runs_here=command.world_size is None)


def print_checked_plan(
    config: RunConfig, note: str, world_size: int, *, runs_here: bool = True, shown: bool = True
) -> None:
    """Check files and device, and print the plan of a run with validated values.

    Args:
        runs_here: whether the run has the same kind of device as this machine, which is checked; otherwise a device
            that cannot run it is only reported.
        shown: whether to print the plan.

    Raises:
        ConfigError: a file or the device does not suit the run.
    """
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.runtime.console import make_console, warn
    from megatron_slm.tokenizers.tokenizer import build_run_tokenizer
    from megatron_slm.training.expected_implementations import check_expected
    from megatron_slm.training.fallback import verified_start
    from megatron_slm.training.free_space import check_start_space
    from megatron_slm.training.plan import print_plan
    from megatron_slm.training.replay_start import replay_config
    from megatron_slm.training.resume import check_start
    from megatron_slm.training.setup import find_reference, score_headers
    from megatron_slm.training.start import plan_start

    console = make_console(shown)
    if config.training.replay_step is not None:
        config = replay_config(config)
    tokenizer = build_run_tokenizer(config)
    check_files(config, tokenizer, verify=True)
    device = default_device()
    checks = partial(check_device, config, device), partial(check_expected, config, device, world_size)
    if runs_here:
        for check in checks:
            check()
        if (warning := slow_products(config, device)) is not None:
            warn(warning)
    else:
        for obstacle in dict.fromkeys(device_obstacles(checks)):
            console.print(obstacle, markup=False)
    if note:
        console.print(note, markup=False)
    for warning in (unused_speculation(config, tokenizer.vocab_size, device), *policy_warnings(config)):
        if warning is not None:
            warn(warning)
    start = verified_start(plan_start(config), config)
    check_start_space(config, tokenizer.vocab_size, start)
    trains = not config.training.skip_train
    reference = find_reference(config, score_headers(config, tokenizer)) if trains else None
    differences = check_start(start, start.adjusted(config), tokenizer, reference)
    console.print(*filter(None, (start.describe(config.checkpoint.save), differences)), sep="\n", markup=False)
    print_plan(console, config, tokenizer.vocab_size, world_size)


def _train(config: RunConfig, note: str, signals: StopSignals | None) -> None:
    order_kernels(config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size)
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.runtime import process
    from megatron_slm.runtime.collective import on_every_rank, on_first_rank
    from megatron_slm.runtime.health.session import verdict_first
    from megatron_slm.runtime.logs import logging_to, open_log
    from megatron_slm.training.flight_recorder import record_collectives
    from megatron_slm.training.loop import train
    from megatron_slm.training.replay import replay
    from megatron_slm.training.replay_start import replay_config
    from megatron_slm.training.setup import parallel_layout

    record_collectives(config)
    groups = process.start(
        parallel_layout(config),
        backend=config.parallel.distributed_backend,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
        seed=config.training.seed,
        hang_timeout=config.parallel.slm_hang_timeout,
    )
    if signals is not None:
        signals.record_all()
    if config.training.replay_step is not None:
        action = partial(replay, original=config, signals=signals)
        config = on_first_rank(lambda: replay_config(config))
    else:
        action = partial(train, signals=signals)
    with logging_to(on_every_rank(lambda: open_log(config.logging.slm_log_dir, groups.rank))), verdict_first():
        _run_job(config, note, groups, action)


def _run_job(config: RunConfig, note: str, groups: Groups, action: Callable[[Run], None]) -> None:
    """Build the run of a configuration, and run ``action`` on it. Collective over all ranks."""
    from megatron_slm.runtime.collective import on_every_rank, on_first_rank
    from megatron_slm.runtime.console import make_console, warn
    from megatron_slm.runtime.software import describe_software
    from megatron_slm.tokenizers.tokenizer import build_run_tokenizer
    from megatron_slm.training.flight_recorder import make_dump_directory
    from megatron_slm.training.metrics import print_settings
    from megatron_slm.training.profiling import record_memory
    from megatron_slm.training.save_directory import locked_save, unchanged_if_refused
    from megatron_slm.training.setup import build_run
    from megatron_slm.training.sinks import closing_all

    tokenizer = on_every_rank(lambda: build_run_tokenizer(config))
    on_first_rank(lambda: check_files(config, tokenizer))
    on_every_rank(lambda: check_device(config, groups.device))
    on_every_rank(lambda: check_memory(config, tokenizer.vocab_size, groups.device))
    console = make_console(groups.is_logging_rank)
    console.print(describe_software(groups))
    if note:
        console.print(note, markup=False)
    print_settings(console, config)
    speculation = unused_speculation(config, tokenizer.vocab_size, groups.device)
    for warning in (slow_products(config, groups.device), speculation, *policy_warnings(config)):
        if groups.is_logging_rank and warning is not None:
            warn(warning)
    save = None if config.training.skip_train else config.checkpoint.save
    with locked_save(save):
        with unchanged_if_refused(save):
            record_memory(config, groups)
            run = build_run(config, tokenizer, groups, console)
        on_first_rank(lambda: make_dump_directory(config))
        with closing_all(run.sinks):
            action(run)
