"""Results of an evaluation as a table and as a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_slm.evaluation.benchmarks import BENCHMARKS
from megatron_slm.evaluation.evaluate import TaskResult
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_replaceable, write_text

FLAG = "--output"
FORMAT = "megatron_slm evaluation 1"


def results_table(results: Sequence[TaskResult]) -> Table:
    """Return a table with one row per task and metric."""
    table = Table("task", "metric", box=None, header_style="bold")
    for heading in ("value", "± stderr", "documents", "shots"):
        table.add_column(heading, justify="right")
    for result in results:
        for metric, score in result.scores.items():
            stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
            shots = "" if result.fewshot is None else str(result.fewshot)
            table.add_row(result.task, metric, f"{score.value:.4f}", stderr, f"{score.count:,}", shots)
    return table


def source_lines(results: Sequence[TaskResult], unavailable: Sequence[str]) -> list[str]:
    """Return the source of every task's data, and the sources of tasks without data here."""
    lines = [f"data of {result.task}: {result.source}" for result in results]
    return lines + [f"not evaluated, without data here: {name} ({BENCHMARKS[name].source})" for name in unavailable]


def check_output(path: str) -> None:
    """Raise ConfigError if the results cannot be written to ``path``; call it before the evaluation."""
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{FLAG} {path}: no such directory. Create it, or choose another path.")
    check_replaceable(path, FLAG, is_ours=_is_ours)


def write_results(
    path: str, results: Sequence[TaskResult], unavailable: Sequence[str], settings: dict[str, Any]
) -> None:
    """Write results and settings to a JSON file, atomically, also in the layout of lm-evaluation-harness's results."""
    tasks = {
        result.task: {
            "fewshot": result.fewshot,
            "source": result.source,
            "scores": {
                metric: {"value": finite(score.value), "stderr": finite(score.stderr), "count": score.count}
                for metric, score in result.scores.items()
            },
        }
        for result in results
    }
    content = {
        "format": FORMAT,
        **settings,
        "tasks": tasks,
        "not_evaluated": list(unavailable),
        "results": {result.task: {"alias": result.task, **dict(_harness_values(result))} for result in results},
        "n-shot": {result.task: result.fewshot for result in results if result.fewshot is not None},
        "versions": {},
    }
    write_text(path, json.dumps(content, indent=2) + "\n", FLAG, is_ours=_is_ours)


def _harness_values(result: TaskResult) -> Iterator[tuple[str, float | str | None]]:
    """Yield the scores of a task under lm-evaluation-harness's keys, METRIC,FILTER."""
    for name, score in result.scores.items():
        metric, _, filtered = name.removesuffix(")").partition(" (")
        yield f"{metric},{filtered or 'none'}", finite(score.value)
        yield f"{metric}_stderr,{filtered or 'none'}", "N/A" if score.stderr is None else finite(score.stderr)


def finite(value: float | None) -> float | None:
    """Return the value, or None if JSON has no notation for it."""
    return value if value is not None and math.isfinite(value) else None


def _is_ours(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
