"""Metrics, events, settings and environment of a run, from the files in its --save directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_slm.analysis.metric_columns import Metrics, Record, Series
from megatron_slm.config.checkpoint_files import CONFIG_FILE
from megatron_slm.config.checkpoint_steps import step_directories
from megatron_slm.config.paths import EVENTS_FILE, METRICS_FILE
from megatron_slm.config.recipe import read_recipe
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_regular
from megatron_slm.runtime.metrics_file import is_foreign, read_records

RECORD_FILE = "slm_run.json"
RUN_REMEDY = "Give the --save directory of a run, or its metrics file."


@dataclass(frozen=True)
class RunFiles:
    """The files of one run, as far as they exist."""

    name: str
    metrics: Path
    columns: Metrics
    events: Sequence[Record]  # spikes and NaN
    settings: dict[str, Any]  # empty if the run has saved none
    environment: dict[str, Any]  # of the latest start; empty if it is not recorded
    origin: dict[str, Any] | None  # initial checkpoint; empty for a run from scratch, None if it is not recorded
    checkpoints: Sequence[int]  # steps
    notes: Sequence[str]  # unreadable files

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
        """Return the last step of the metrics."""
        return self.columns.step

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
    """Return the runs of a command line, with different names.

    Raises:
        ConfigError: a path is not that of a run.
    """
    runs = list({run.metrics.resolve(): run for run in map(read_run, dict.fromkeys(paths))}.values())
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else RunFiles(**{**vars(run), "name": str(run.metrics.parent)})
        for run in runs
    ]


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
    settings = _saved_settings(checkpoints, notes)
    record = _read_object(directory / RECORD_FILE, notes)
    settings = settings or _mapping(record.get("settings"))
    if metrics.name != METRICS_FILE and settings.get("slm_metrics_file") != path:
        settings, record, checkpoints = {}, {}, {}  # of another run, whose metrics.jsonl replaced these metrics
    if given.is_dir() and not metrics.exists() and (elsewhere := settings.get("slm_metrics_file")):
        metrics = Path(elsewhere)
    if metrics.is_file() and is_foreign(metrics):
        raise ConfigError(f"{metrics} is not a metrics file of this trainer. {RUN_REMEDY}")
    if not metrics.is_file() and not checkpoints and not record:
        raise ConfigError(f"{path} holds neither {METRICS_FILE} nor a checkpoint. {RUN_REMEDY}")
    events = Path(settings.get("slm_events_file") or directory / EVENTS_FILE)
    return RunFiles(
        name=directory.resolve().name if metrics.name == METRICS_FILE else metrics.stem,
        metrics=metrics,
        columns=Metrics(read_records(metrics)),
        events=[event for event in read_records(events) if event["kind"] == "event"],
        settings=settings,
        environment=_mapping(record.get("environment")),
        origin=_mapping(record["origin"]) if "origin" in record else None,
        checkpoints=list(checkpoints),
        notes=notes,
    )


def _saved_settings(checkpoints: dict[int, Path], notes: list[str]) -> dict[str, Any]:
    """Return the settings in the newest checkpoint that has them; empty if none has."""
    for directory in reversed(checkpoints.values()):
        if (directory / CONFIG_FILE).is_file():
            try:
                return read_recipe(directory / CONFIG_FILE)
            except ConfigError as error:
                notes.append(str(error))
    return {}


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        check_regular(path)
        return _mapping(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path} cannot be read ({error})")
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
