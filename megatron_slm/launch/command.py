"""Command line of the launcher: ``megatron-slm-launch [chain|status|logs|cancel]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.recipe import suggest_name
from megatron_slm.launch.cancellation import cancel
from megatron_slm.launch.chain import read_chain, submit_chain
from megatron_slm.launch.flags import parse_request
from megatron_slm.launch.logs import find_log, follow, last_lines
from megatron_slm.launch.records import JobRecord, original_of, queued_states, read_jobs
from megatron_slm.launch.status import status_of
from megatron_slm.launch.submission import Prepared, check_idle, prepare
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.output import print_result, print_summary
from megatron_slm.runtime.reporting import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = COMMANDS.get(name)
    return run_tool(lambda: submit_run([name, *rest]) if command is None else command(rest))


def submit_run(argv: Sequence[str]) -> None:
    """Check and submit one job, or print its script."""
    if not argv[0].startswith("-"):
        suggestion = suggest_name(argv[0], list(COMMANDS))
        raise ConfigError(f"{argv[0]!r} is no command.{suggestion} The commands are {', '.join(COMMANDS)}.")
    request = parse_request(argv)
    job = prepare(request)
    if request.dry_run:
        print_result(job.script)
        return
    check_idle(job.record)
    job.write()
    record = job.submit()
    print_summary(f"submitted job {record.job_id}; script and logs in {record.records}")


def submit_stages(argv: Sequence[str]) -> None:
    """Check and submit the stages of a chain, or print their scripts."""
    parser = Parser(prog="megatron-slm-launch chain", description="Submit the stages of a chain as dependent jobs.")
    parser.add_argument("file", type=expand_user, help="YAML file with directory, defaults and stages")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts and submit nothing")
    arguments = parse_strictly(parser, argv, {})
    chain = read_chain(Path(arguments.file), dry_run=arguments.dry_run)
    prepared = submit_chain(chain, dry_run=arguments.dry_run)
    if arguments.dry_run:
        print_result("\n".join(_titled(job) for job in prepared))


def show_status(argv: Sequence[str]) -> None:
    """Print the state, step, rate and time left of a run, or of the stages of a chain."""
    parser = _directory_parser("status", "Print the state, step, rate and time left of a run or chain.")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    arguments = parse_strictly(parser, argv, {})
    found = status_of(_chosen(arguments))
    if arguments.json:
        print_result(json.dumps([status.values() for status in found], indent=1) + "\n")
    else:
        print_result("".join(f"{status.line()}\n" for status in found))


def show_logs(argv: Sequence[str]) -> None:
    """Print the last lines of a job's output, and follow it."""
    parser = _directory_parser("logs", "Print the output of a job, whose lines start with the number of the rank.")
    parser.add_argument("--rank", type=int, help="print the lines of this rank only (of a node with torchrun)")
    parser.add_argument("--seed", type=int, help="seed of an array job")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="number of last lines to print [40]")
    parser.add_argument("--follow", action="store_true", help="print new lines until the job has ended")
    arguments = parse_strictly(parser, argv, {})
    if arguments.lines < 0:
        raise ConfigError(f"--lines is {arguments.lines}, and must be at least 0.")
    jobs = _chosen(arguments)
    if len(jobs) > 1:
        raise ConfigError(f"--stage is missing: choose one of {', '.join(job.stage for job in jobs)}.")
    job = jobs[0]
    path, position = find_log(job, arguments.seed), 0
    if path.exists():
        lines, position = last_lines(path, arguments.lines, arguments.rank)
        print_result("".join(f"{line}\n" for line in lines))
    elif not arguments.follow:
        raise ConfigError(f"{path} does not exist yet: the job has not started, or ran on another file system.")
    if arguments.follow:
        for line in follow(path, position, lambda: _is_active(job), arguments.rank):
            print_result(f"{line}\n")


def cancel_jobs(argv: Sequence[str]) -> None:
    """Cancel a run, or the stages of a chain."""
    parser = _directory_parser("cancel", "Cancel a run or chain, wait for its processes, and remove its lock.")
    arguments = parse_strictly(parser, argv, {})
    if (original := original_of(arguments.directory)) is not None:
        raise ConfigError(
            f"{arguments.directory} is a copy of {original}, whose jobs it names. Give {original} to cancel them."
        )
    for line in cancel(_chosen(arguments)):
        print_summary(line)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "chain": submit_stages,
    "status": show_status,
    "logs": show_logs,
    "cancel": cancel_jobs,
}


def _directory_parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"megatron-slm-launch {name}", description=description)
    parser.add_argument("directory", type=expand_user, help="directory of a run or of a chain")
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="only these stages of a chain")
    return parser


def _chosen(arguments: argparse.Namespace) -> list[JobRecord]:
    """Return the jobs of --stage, or all jobs of the directory."""
    jobs = read_jobs(arguments.directory)
    names = [job.stage for job in jobs]
    for name in arguments.stage or ():
        if name not in names:
            raise ConfigError(f"--stage {name}: {arguments.directory} has the stages {', '.join(names)}.")
    return [job for job in jobs if arguments.stage is None or job.stage in arguments.stage]


def _is_active(job: JobRecord) -> bool:
    return any(not state.has_ended for state in queued_states([job]))


def _titled(job: Prepared) -> str:
    return f"# {job.script_path}\n{job.script}"
