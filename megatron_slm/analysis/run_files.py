"""Metrics, events, settings and environment of a run, from the files in its --save directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_slm.analysis.metric_columns import Metrics, Record, Series, is_number
from megatron_slm.config.checkpoint_files import CONFIG_FILE
from megatron_slm.config.checkpoint_steps import step_directories
from megatron_slm.config.paths import EVENTS_FILE, METRICS_FILE
from megatron_slm.config.recipe import read_recipe
from megatron_slm.config.run_record import RECORD_FILE, load_run_record, locate_recorded, missing_metrics
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.metrics_file import is_foreign, read_records

RUN_REMEDY = "Give the --save directory of a run, or its metrics file."
EVENT_KEYS = ("step", "time", "event", "action", "message")  # of events; their samples may be large


@dataclass(frozen=True)
class RunFiles:
    """The files of one run, as far as they exist."""

    name: str
    metrics: Path
    columns: Metrics
    events: Sequence[Record]  # spikes and NaN, with EVENT_KEYS
    settings: dict[str, Any]  # empty if the run has saved none
    environment: dict[str, Any]  # of the latest start; empty if it is not recorded
    origin: dict[str, Any] | None  # initial checkpoint; empty for a run from scratch, None if it is not recorded
    checkpoints: Sequence[int]  # steps
    notes: Sequence[str]  # missing and unreadable files

    def series(self, metric: str, kind: str = "train", name: str | None = None) -> Series:
        """Return one metric of a kind of record, of the set ``name`` for evaluations, from the records that have it."""
        return self.columns.series(metric, kind, name)

    def sets(self, kind: str = "eval") -> list[str]:
        """Return the names of the validation sets or benchmarks, in the order of the file."""
        return self.columns.sets(kind)

    def metric_names(self, kind: str = "train") -> list[str]:
        """Return the names of all numeric metrics of a kind of record, except step and tokens."""
        return self.columns.names(kind)

    @property
    def step(self) -> int:
        """Return the last step of the metrics; without metrics, of the checkpoints."""
        return self.columns.step if self.columns.tables else max(self.checkpoints, default=0)

    @property
    def tokens(self) -> int:
        """Return the tokens that the run had read at the last step of the metrics."""
        return self.columns.tokens

    @property
    def updated(self) -> str:
        """Return the time of the last change of the metrics file; "" if there is none."""
        try:
            seconds = self.metrics.stat().st_mtime
        except OSError:
            return ""
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def read_runs(paths: Sequence[str]) -> list[RunFiles]:
    """Return the runs of a command line, with different names, and print their notes.

    Raises:
        ConfigError: a path is not that of a run, or the metrics of a run are those of another.
    """
    found: dict[Path, tuple[Path, RunFiles]] = {}
    for path in map(Path, paths):
        run = read_run(str(path))
        # without metrics, runs may name the same device or missing file
        key = run.metrics if run.metrics.is_file() else path
        first, _ = found.setdefault(key.resolve(), (path, run))
        if first.is_dir() and path.is_dir() and not first.samefile(path):
            raise ConfigError(
                f"{first} and {path} have the same metrics file, {run.metrics}, which holds the metrics of one run "
                "only. Leave the other one out."
            )
    for _, run in found.values():
        for note in run.notes:
            notice(note)
    names = [run.name for _, run in found.values()]
    return [run if names.count(run.name) == 1 else replace(run, name=str(path)) for path, run in found.values()]


def read_run(path: str) -> RunFiles:
    """Return the run of a --save directory or of a metrics file.

    Raises:
        ConfigError: there is no such path, or it holds neither metrics nor checkpoints.
    """
    given = Path(path)
    if not given.exists():
        raise ConfigError(f"{path}: no such file or directory. {RUN_REMEDY}")
    directory, metrics = (given, given / METRICS_FILE) if given.is_dir() else (given.parent, given)
    checkpoints = step_directories(directory, path)
    notes: list[str] = []
    record = _run_record(directory, notes)
    settings = _mapping(record.get("settings")) or _saved_settings(checkpoints, notes)  # those of the latest start
    named = settings.get("slm_metrics_file")
    elsewhere = _recorded_file(named, record, directory / METRICS_FILE)
    events = _recorded_file(settings.get("slm_events_file"), record, directory / EVENTS_FILE)
    if metrics.name != METRICS_FILE and metrics.resolve() != elsewhere.resolve():
        # of another run, whose metrics.jsonl replaced these metrics
        settings, record, checkpoints, named, events = {}, {}, {}, None, Path(os.devnull)
    if given.is_dir() and not metrics.exists():
        metrics = elsewhere
    elif given.is_dir() and metrics.resolve() != elsewhere.resolve() and _has_content(elsewhere):
        notes.append(
            f"metrics are those of {elsewhere}, which the latest start names; {metrics} has those of earlier steps"
        )
        metrics = elsewhere
    notes += missing_metrics(named, metrics)
    if metrics.is_file() and is_foreign(metrics):
        raise ConfigError(f"{metrics} is not a metrics file of this trainer. {RUN_REMEDY}")
    if not metrics.is_file() and not checkpoints and not record:
        raise ConfigError(f"{path} holds neither {METRICS_FILE} nor a checkpoint. {RUN_REMEDY}")
    return RunFiles(
        name=_name(directory) if given.is_dir() or given.name == METRICS_FILE else given.name.removesuffix(".jsonl"),
        metrics=metrics,
        columns=Metrics(read_records(metrics)),
        events=list(_events(events)),
        settings=settings,
        environment=_mapping(record.get("environment")),
        origin=_mapping(record["origin"]) if "origin" in record else None,
        checkpoints=list(checkpoints),
        notes=notes,
    )


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _saved_settings(checkpoints: dict[int, Path], notes: list[str]) -> dict[str, Any]:
    """Return the settings in the newest checkpoint that has them; empty if none has."""
    for directory in reversed(checkpoints.values()):
        if (directory / CONFIG_FILE).is_file():
            try:
                return read_recipe(directory / CONFIG_FILE)
            except ConfigError as error:
                notes.append(str(error))
    return {}


def _run_record(directory: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return load_run_record(directory)
    except (OSError, ValueError) as error:
        notes.append(f"{directory / RECORD_FILE} cannot be read ({error})")
        return {}


def _recorded_file(name: Any, record: Record, default: Path) -> Path:
    """Return the file that the settings of a run name, or the default."""
    return locate_recorded(name, record) if isinstance(name, str) else default


def _events(path: Path) -> Iterator[Record]:
    """Yield the events of a file without their samples."""
    for event in read_records(path):
        if event["kind"] == "event" and is_number(event["step"]):
            yield {name: event[name] for name in EVENT_KEYS if name in event}


def _name(directory: Path) -> str:
    return directory.resolve().name or str(directory)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
