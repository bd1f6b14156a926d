"""JSONL file of training metrics: recognize existing files and prepare them for a new or resumed run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from megatron_slm.runtime.append import is_stream
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import explained_write, write_bytes

METRICS_FLAG = "--slm-metrics-file"
EVENTS_FLAG = "--slm-events-file"
# Metrics of a step that a repetition of it reproduces.
REPRODUCIBLE = ("loss", "loss_all", "loss_unselected", "share_selected", "threshold", "selection", "grad_norm", "lr")


def prepare_metrics_file(path: Path, resumed_step: int, flag: str = METRICS_FLAG) -> Path | None:
    """Prepare an existing metrics file for a run that has completed ``resumed_step`` steps.

    A resumed run drops damaged lines and lines of later steps. A new run renames the earlier file to NAME.1 (or the
    next free number), also a file of events. Devices and pipes are unchanged.

    Args:
        flag: flag that names the file, for error messages.

    Returns:
        The new path of the earlier file, or None.

    Raises:
        ConfigError: the file was not written by megatron_slm, or cannot be written.
    """
    if is_foreign(path):
        raise ConfigError(foreign_message(path, flag))
    if is_stream(path) or not path.exists() or not path.stat().st_size:
        return None
    if not resumed_step:
        return _keep(path, flag)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (step := _step(line)) is not None and step <= resumed_step]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(kept), flag)
    return None


def evaluated_sets(path: Path | None, step: int) -> set[tuple[str, str]]:
    """Return the kind and name of every validation set and benchmark that a metrics file has after ``step``."""
    records = (record for record in read_records(path) if record["step"] == step and "set" in record)
    return {(record["kind"], record["set"]) for record in records}


def training_record(path: Path | None, step: int, interval: int) -> tuple[dict[str, Any] | None, int]:
    """Return the newest training metrics of ``step``, or None, and the number of steps of which they are means.

    Args:
        interval: log interval of the first metrics of the file; that of others is their distance.
    """
    found, earlier = None, -1
    for record in read_records(path):
        if record["kind"] == "train" and record["step"] <= step:
            if record["step"] == step:
                found = record
            else:
                earlier = max(earlier, record["step"])
    return found, step - earlier if earlier >= 0 else min(step, interval)


def read_records(path: Path | None) -> Iterator[dict[str, Any]]:
    """Yield all complete records of a metrics file; none if there is no file, and of a device or pipe."""
    if path is None or is_stream(path) or not path.exists():
        return
    with path.open("rb") as file:
        yield from (record for record in map(_record, file) if record is not None)


def is_foreign(path: Path) -> bool:
    """Return whether ``path`` is a nonempty regular file that megatron_slm did not write."""
    if is_stream(path) or not path.exists():
        return False
    with path.open("rb") as file:
        first = file.readline()
    return bool(first) and not _is_ours(first)


def foreign_message(path: Path, flag: str) -> str:
    """Return the error message for a file that must not be replaced."""
    return f"{flag}: {path} exists and was not written by megatron_slm. Choose another path, or remove the file."


def _keep(path: Path, flag: str) -> Path:
    """Rename a metrics file to the first free numbered name; a symbolic link to it is kept."""
    path = path.resolve()
    kept = next(other for number in count(1) if not (other := Path(f"{path}.{number}")).exists())
    with explained_write(path, flag):
        path.rename(kept)
    return kept


def _is_ours(first_line: bytes) -> bool:
    is_cut = not first_line.endswith(b"\n") and first_line.startswith(b'{"kind": "')
    return is_cut or _step(first_line) is not None


def _step(line: bytes) -> int | None:
    """Return the step of a complete metrics line; None for any other line."""
    record = _record(line)
    return None if record is None else record["step"]


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a complete metrics line; None for any other line."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if is_record else None
