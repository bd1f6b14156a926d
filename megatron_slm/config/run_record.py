"""Torch-free access to the record of a run in its --save directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_slm.runtime.files import check_regular

RECORD_FILE = "slm_run.json"


def load_run_record(directory: Path) -> dict[str, Any]:
    """Return the content of the record in ``directory``; empty if there is none.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a JSON object.
    """
    path = directory / RECORD_FILE
    try:
        check_regular(path)
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def locate_recorded(path: str, record: Mapping[str, Any]) -> Path:
    """Return a path of the settings of a run, which may be relative to the working directory of its latest start.

    Args:
        path: value of a setting.
        record: result of :func:`load_run_record`; earlier releases did not record the directory.

    Returns:
        The path in that directory if it exists, otherwise ``path`` itself.
    """
    environment = record.get("environment")
    start = environment.get("directory") if isinstance(environment, dict) else None
    with suppress(OSError):  # the directory may be on another machine, or another user's
        if isinstance(start, str) and (located := Path(start) / path).exists():
            return located
    return Path(path)


def missing_metrics(name: str | None, located: Path) -> list[str]:
    """Return a note if the metrics file that a run's settings name does not exist.

    Args:
        name: ``--slm-metrics-file`` of the run.
        located: the file itself, by :func:`locate_recorded`.
    """
    if not name or located.exists():
        return []
    return [
        f"--slm-metrics-file {name} of the run does not exist. If the run has logged a step, start this command in the "
        "working directory of the run."
    ]
