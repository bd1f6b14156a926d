"""Chains: stages that depend on each other, from a YAML file, submitted as Slurm jobs with dependencies.

A stage starts when all stages in its ``after`` have succeeded; if one fails, Slurm cancels it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.config.blends import UniqueLoader
from megatron_slm.config.paths import expand_user
from megatron_slm.config.recipe import suggest_name
from megatron_slm.launch import slurm
from megatron_slm.launch.flags import JobRequest, job_parser, parse_request
from megatron_slm.launch.records import JobRecord, write_chain
from megatron_slm.launch.submission import Prepared, check_idle, prepare
from megatron_slm.runtime.errors import ConfigError, refuse
from megatron_slm.runtime.output import print_summary

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
AFTER, FLAGS, RECIPES, COMMAND = "after", "flags", "recipes", "command"
TOP_LEVEL = ("directory", "defaults", "stages")
NOT_IN_STAGES = ("dry_run", "config")


@dataclass(frozen=True)
class Stage:
    """Represent a stage of a chain."""

    name: str
    after: list[str]
    request: JobRequest


@dataclass(frozen=True)
class Chain:
    """Represent a chain with its stages in an order in which each follows those that it depends on."""

    directory: Path
    stages: list[Stage]

    def dependents(self, name: str) -> list[str]:
        """Return all stages that start only after the stage ``name``, directly or not."""
        found = {name}
        for stage in self.stages:
            if found & set(stage.after):
                found.add(stage.name)
        return [stage.name for stage in self.stages if stage.name in found - {name}]


class _TextLoader(UniqueLoader):
    """YAML loader that reads scalars as text: 24:00:00 would be a number of seconds."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (as in the base class)


def read_chain(path: Path, *, dry_run: bool) -> Chain:
    """Return the chain in a YAML file.

    Raises:
        ConfigError: the file cannot be read, or a stage is wrong.
    """
    content = _read(path)
    for name in content:
        if name not in TOP_LEVEL:
            raise ConfigError(f"{path}: {name} is unknown; a chain has {', '.join(TOP_LEVEL)}.")
    stages = content.get("stages")
    if not isinstance(content.get("directory"), str) or not content["directory"].strip():
        raise ConfigError(
            f"{path}: directory is missing. Name the directory of the chain, below which each stage has one."
        )
    if not isinstance(stages, dict) or not stages:
        raise ConfigError(f"{path}: stages is missing. Write a mapping of stage names to settings.")
    directory = Path(expand_user(content["directory"])).absolute()
    defaults = _mapping(content.get("defaults") or {}, f"{path}: defaults")
    parsed, problems = [], list[str]()
    for name, values in stages.items():
        try:
            parsed.append(_stage(str(name), values, defaults, directory, f"{path}: {name}", dry_run=dry_run))
        except ConfigError as error:
            message = str(error)
            problems.append(message if message.startswith(f"{path}: ") else f"{path}: {name}: {message}")
    refuse(problems)
    return Chain(directory, _ordered(parsed, path))


def submit_chain(chain: Chain, *, dry_run: bool) -> list[Prepared]:
    """Check all stages, then submit those that have not succeeded already; all of them or none.

    Raises:
        ConfigError: a stage is wrong or in the queue, or Slurm refuses it.
    """
    prepared = _prepare(chain)
    if dry_run:
        return list(prepared.values())
    finished = _finished(chain, prepared)
    for name, job in prepared.items():
        if name not in finished:
            check_idle(job.record)
    for name, job in prepared.items():
        if name not in finished:
            job.write()
    _submit(chain, prepared, finished)
    return list(prepared.values())


def _prepare(chain: Chain) -> dict[str, Prepared]:
    prepared, problems = dict[str, Prepared](), list[str]()
    for stage in chain.stages:
        dependents = chain.dependents(stage.name)
        try:
            job = prepare(stage.request, stage=stage.name, after=stage.after, dependents=dependents)
            prepared[stage.name] = job
        except ConfigError as error:
            problems.append(f"stage {stage.name}: {error}")
    refuse(problems)
    places = [str(Path(job.record.run_dir).resolve()) for job in prepared.values()]
    refuse(
        [f"several stages have the run directory {place}." for place in sorted(set(places)) if places.count(place) > 1]
    )
    return prepared


def _finished(chain: Chain, prepared: Mapping[str, Prepared]) -> set[str]:
    """Return the stages that have succeeded, and whose predecessors need not run either."""
    finished: set[str] = set()
    for stage in chain.stages:
        if prepared[stage.name].is_finished and finished.issuperset(stage.after):
            finished.add(stage.name)
    return finished


def _submit(chain: Chain, prepared: Mapping[str, Prepared], finished: set[str]) -> None:
    jobs: dict[str, JobRecord] = {}
    submitted: list[str] = []
    try:
        for stage in chain.stages:
            job = prepared[stage.name]
            if stage.name in finished:
                jobs[stage.name] = job.record
                print_summary(f"{stage.name}: finished already")
                continue
            after = [jobs[name].job_id for name in stage.after if name not in finished]
            jobs[stage.name] = record = job.submit(after)
            submitted.append(record.job_id)
            depends = f", after {', '.join(stage.after)}" if after else ""
            print_summary(f"{stage.name}: job {record.job_id}{depends}; {job.script_path}")
        write_chain(chain.directory, list(jobs.values()))
    except BaseException:
        with suppress(ConfigError):
            slurm.cancel(submitted)
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _TextLoader)
    except OSError as error:
        raise ConfigError(f"{path}: the chain cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the chain is not valid YAML: {error}") from error
    return _mapping(content, str(path))


def _mapping(content: Any, location: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{location} must be a mapping of names to values.")
    return {str(name): value for name, value in content.items()}


def _stage(name: str, values: Any, defaults: dict[str, Any], directory: Path, location: str, *, dry_run: bool) -> Stage:
    if not STAGE_NAME.fullmatch(name):
        raise ConfigError(f"{location}: a stage name has letters, digits, dots, dashes and underscores.")
    merged: dict[str, Any] = {"name": f"{directory.name}-{name}", "run-dir": str(directory / name)}
    for level in (defaults, _mapping(values, location)):
        merged |= {key.replace("_", "-"): value for key, value in level.items()}
    after = _texts(merged.pop(AFTER, []), f"{location}: {AFTER}")
    flags = merged.pop(FLAGS, [])
    arguments = _words(flags, location) if isinstance(flags, str) else _texts(flags, f"{location}: {FLAGS}")
    recipes = _texts(merged.pop(RECIPES, []), f"{location}: {RECIPES}")
    argv = [*(["--config", *recipes] if recipes else []), *_job_flags(merged, location)]
    known = parse_request([*argv])
    if known.arguments:
        raise ConfigError(f"{location}: {known.arguments[0]} is no setting of a stage.")
    return Stage(name, after, replace(known, arguments=arguments, dry_run=dry_run))


def _job_flags(values: dict[str, Any], location: str) -> Iterator[str]:
    """Yield the flags of a job for settings of a stage."""
    actions = {action.dest: action for action in job_parser()._actions if action.dest not in NOT_IN_STAGES}
    names = [name.replace("_", "-") for name in (*actions, AFTER, FLAGS, RECIPES)]
    for name, value in values.items():
        action = actions.get(name.replace("-", "_"))
        if action is None:
            raise ConfigError(f"{location}: {name} is no setting of a stage.{suggest_name(name, names)}")
        texts = _texts(value, f"{location}: {name}")
        if len(action.option_strings) == 2 and action.nargs == 0:
            if texts not in (["true"], ["false"]):
                raise ConfigError(f"{location}: {name} must be true or false.")
            yield action.option_strings[texts == ["false"]]
        elif action.nargs == "+":
            yield from (f"--{name}", *texts)
        else:
            yield from (f"--{name}={text}" for text in texts)


def _words(flags: str, location: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise ConfigError(
            f"{location}: {FLAGS}: {flags!r} has an unpaired quote or backslash. Add its pair."
        ) from error


def _texts(value: Any, location: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{location} must be a value or a list of values.")
    return texts


def _ordered(stages: list[Stage], path: Path) -> list[Stage]:
    """Return the stages so that each follows those that it depends on."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        for name in stage.after:
            if name not in by_name:
                raise ConfigError(
                    f"{path}: {stage.name}: after names {name!r}, which is no stage.{suggest_name(name, list(by_name))}"
                )
        if "dependency" in dict(stage.request.settings.sbatch_options) and stage.after:
            raise ConfigError(f"{path}: {stage.name}: after and the sbatch option dependency exclude each other.")
    try:
        order = TopologicalSorter({stage.name: stage.after for stage in stages}).static_order()
        return [by_name[name] for name in order]
    except CycleError as error:
        raise ConfigError(f"{path}: stages depend on each other: {' -> '.join(error.args[1])}.") from error
