"""The tasks that --tasks names, from --tasks-dir or lm-evaluation-harness."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_slm.evaluation.answers import check_answers_can_be_compared
from megatron_slm.evaluation.benchmarks import BENCHMARKS, LISTS, expand_lists
from megatron_slm.evaluation.documents import Task
from megatron_slm.evaluation.task_directory import FLAG, open_task_directory
from megatron_slm.runtime.errors import ConfigError, refuse

SIMILAR = 5  # names in a message


@dataclass(frozen=True)
class SelectedNames:
    """Names of tasks that a source has, and those of a list that it lacks."""

    available: tuple[str, ...]
    unavailable: tuple[str, ...]


def select_names(names: Sequence[str], available: Collection[str], place: str, flag: str = "--tasks") -> SelectedNames:
    """Expand the lists ``math`` and ``general`` and divide the names by whether the source has them.

    Args:
        names: values of ``flag``.
        available: names of the source.
        place: the source, for messages.
        flag: flag that gives the names.

    Raises:
        ConfigError: the source lacks a task that was given by its name, or all tasks.
    """
    requested = expand_lists(names)
    refuse(
        [
            f"{flag}: {place} has no task {name}.{_similar(name, available)}{_known_source(name)}"
            for name, is_explicit in requested.items()
            if is_explicit and name not in available
        ]
    )
    found = tuple(name for name in requested if name in available)
    if not found:
        raise ConfigError(f"{flag}: {place} has none of the tasks of {', '.join(names)}. Give another source of data.")
    return SelectedNames(found, tuple(name for name in requested if name not in available))


def _similar(name: str, available: Collection[str]) -> str:
    found = difflib.get_close_matches(name, [*available, *LISTS], n=SIMILAR, cutoff=0.6)
    return f" Similar names: {', '.join(found)}." if found else " --list-tasks prints the names."


def _known_source(name: str) -> str:
    return f" Sources of its data: {BENCHMARKS[name].source}." if name in BENCHMARKS else ""


def read_tasks(
    names: Sequence[str], path: str, *, fewshot: int | None = None, limit: int | None = None, flag: str = "--tasks"
) -> tuple[list[Task], tuple[str, ...]]:
    """Return the tasks of ``--tasks-dir``, and the names of those in a list that it lacks.

    Args:
        names: tasks and lists.
        path: value of ``--tasks-dir``.
        fewshot: examples in each context; None for the fewest.
        limit: read only the first documents of each part of a task.
        flag: flag that gives the names.

    Raises:
        ConfigError: a task is missing, unreadable, not available with ``fewshot`` examples, or needs math-verify, which
            is not installed.
    """
    readers = open_task_directory(path)
    selected = select_names(names, readers.keys(), f"{FLAG} {path}", flag)
    tasks = [readers[name](fewshot, limit) for name in selected.available]
    for task in tasks:
        check_answers_can_be_compared(task)
    return tasks, selected.unavailable
