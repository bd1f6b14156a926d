"""Flags of a job; all other arguments are those of its command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron_slm.cli.__main__ import command_names
from megatron_slm.config.flags import Parser
from megatron_slm.config.paths import expand_user
from megatron_slm.config.recipe import refuse_empty
from megatron_slm.launch.settings import APPTAINER, PRETRAIN, PYXIS, SRUN, TORCHRUN, JobSettings

DESCRIPTION = """Submit a training run, or another command of megatron_slm, to Slurm.

    megatron-slm-launch --nodes 8 --partition gpu --time 24:00:00 --config run.yaml --save runs/slm
    megatron-slm-launch chain CHAIN.yaml      submit stages that depend on each other
    megatron-slm-launch status DIRECTORY      state, step, rate and time left of a run or chain
    megatron-slm-launch logs DIRECTORY        output of a job
    megatron-slm-launch cancel DIRECTORY      cancel a run or chain, and remove its lock

Flags that are not listed are passed to the command, and checked before submission."""


@dataclass(frozen=True)
class JobRequest:
    """Represent the command line of one job."""

    settings: JobSettings
    command: str
    recipes: list[str]
    arguments: list[str]  # of the command, without recipes
    run_dir: str | None
    dry_run: bool
    check_files: bool


def parse_request(argv: Sequence[str]) -> JobRequest:
    """Parse the flags of a job, and leave all other arguments to its command.

    Raises:
        ConfigError: an invalid value.
        SystemExit: after --help.
    """
    parser = job_parser()
    given, arguments = parser.parse_known_args(list(argv))
    values = vars(given)
    for name, value in values.items():
        if name not in ("env", "setup"):  # values may be empty
            refuse_empty(value, f"--{name.replace('_', '-')}")
    names = [field.name for field in fields(JobSettings)]
    settings = JobSettings(**{name: values[name] for name in names if name in values})
    settings.check()
    return JobRequest(
        settings,
        command=values.get("command", PRETRAIN),
        recipes=values.get("config", []),
        arguments=arguments,
        run_dir=values.get("run_dir"),
        dry_run=values.get("dry_run", False),
        check_files=values.get("check_files", True),
    )


def job_parser() -> Parser:
    """Return the parser of the flags of a job; flags that are not given are absent from its result."""
    parser = Parser(prog="megatron-slm-launch", description=DESCRIPTION, argument_default=argparse.SUPPRESS)
    _add_job_flags(parser)
    _add_resource_flags(parser)
    _add_environment_flags(parser)
    return parser


def _add_job_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--config", nargs="+", action="extend", metavar="RECIPE.yaml", help="recipes, copied to the run directory")
    add(
        "--run-dir",
        type=expand_user,
        metavar="DIRECTORY",
        help="directory whose subdirectory slurm/ receives script, recipes, logs and state; default --save, which "
        "defaults to it",
    )
    add("--command", choices=command_names(), help=f"command of megatron_slm [{PRETRAIN}]")
    add("--dry-run", action="store_true", help="check everything, print the script and submit nothing")
    add(
        "--check-files",
        action=argparse.BooleanOptionalAction,
        help="check files before submission, not only flags; turn it off for paths of a container [on]",
    )
    add("--seeds", nargs="+", type=int, metavar="SEED", help="array job with one run per seed in RUN_DIR/seed-SEED")


def _add_resource_flags(parser: Parser) -> None:
    add = parser.add_argument_group("resources and limits").add_argument
    default = JobSettings()
    add("--nodes", type=int, help=f"number of nodes [{default.nodes}]")
    add(
        "--spare-nodes",
        type=int,
        metavar="N",
        help="nodes to allocate in addition; the ranks start if --nodes of all nodes pass the check, and the others "
        f"stay idle [{default.spare_nodes}]",
    )
    add("--gpus-per-node", type=int, help=f"GPUs of each node; 0 trains on CPUs [{default.gpus_per_node}]")
    add("--ranks-per-node", type=int, help="ranks of each node; default one per GPU")
    add("--cpus-per-task", type=int, help="CPU cores of a rank, or of a node with --launcher torchrun")
    add("--name", help="job name; default the name of the run directory")
    add("--partition", help="partition of Slurm")
    add("--account", help="account of Slurm")
    add("--qos", help="quality of service")
    add("--time", metavar="LIMIT", help="time limit: minutes, HH:MM:SS or DAYS-HH:MM:SS")
    add(
        "--signal-time",
        type=int,
        metavar="SECONDS",
        help=f"send SIGUSR1, on which a run saves, this long before the time limit [{default.signal_time}]",
    )
    add(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        help="requeue a job whose run stopped before its end, or whose node failed [on]",
    )
    add(
        "--restarts",
        type=int,
        metavar="N",
        help=f"requeue a job whose ranks failed, at most N times without a new checkpoint [{default.restarts}]",
    )
    add(
        "--check-nodes",
        action=argparse.BooleanOptionalAction,
        help="check the nodes before the ranks start, and exclude unhealthy ones [on]",
    )
    add(
        "--sbatch",
        nargs="+",
        action="extend",
        metavar="NAME[=VALUE]",
        help="additional options of sbatch without leading dashes, for example mem=0 exclusive constraint=h100",
    )


def _add_environment_flags(parser: Parser) -> None:
    add: Any = parser.add_argument_group("environment of the ranks").add_argument
    add("--launcher", choices=(SRUN, TORCHRUN), help=f"program that starts the ranks [{SRUN}]")
    add("--env", nargs="+", action="extend", metavar="NAME=VALUE", help="environment variables; values are literal")
    add("--module", nargs="+", action="extend", metavar="NAME", help="modules to load")
    add("--venv", type=expand_user, metavar="DIRECTORY", help="virtual environment to activate")
    add("--python", type=expand_user, help="Python interpreter; default that of --venv, python in a container, or this")
    add("--setup", action="append", metavar="COMMAND", help="bash command to run first; may be repeated")
    add("--container-image", metavar="IMAGE", help="container image in which the ranks run")
    add("--container-runtime", choices=(PYXIS, APPTAINER), help=f"container runtime [{PYXIS}, of enroot]")
    add(
        "--container-mounts",
        nargs="+",
        action="extend",
        metavar="SOURCE:TARGET",
        help="directories to mount; the working directory and the run directory are mounted always",
    )
