"""Evaluate tasks whose documents are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.evaluation.answers import has_answer
from megatron_slm.evaluation.documents import Document, Task
from megatron_slm.evaluation.metrics import Outcome, Score, score_documents
from megatron_slm.evaluation.runner import RequestRunner
from megatron_slm.runtime.collective import on_first_rank


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task by metric."""

    task: str
    scores: dict[str, Score]
    fewshot: int | None
    source: str


def evaluate_tasks(runner: RequestRunner, tasks: Sequence[Task]) -> list[TaskResult]:
    """Return the scores of tasks. Collective over all ranks; errors as in :func:`evaluate_task`."""
    return [evaluate_task(runner, task) for task in tasks]


def evaluate_task(runner: RequestRunner, task: Task) -> TaskResult:
    """Return the scores of a task, on every rank. Collective over all ranks.

    Args:
        runner: runs the requests.
        task: documents and metrics.

    Raises:
        ConfigError: a request does not fit into the model's context.
        Stopped: the runner must stop.
    """
    documents = task.documents
    choices = [choice for document in documents for choice in document.choices]
    likelihoods = runner.log_likelihoods(choices, task.name) if choices else []
    generated = _generate(runner, task, documents) if task.generates else [""] * len(documents)
    outcomes = on_first_rank(lambda: _outcomes(task, documents, likelihoods, generated))
    return TaskResult(task.name, score_documents(documents, outcomes, task.metrics), task.fewshot, task.source)


def _generate(runner: RequestRunner, task: Task, documents: Sequence[Document]) -> list[str]:
    prompts = [document.prompt for document in documents if document.prompt is not None]
    assert len(prompts) == len(documents), "metrics are those that every document allows"
    return runner.generate(prompts, task.name)


def _outcomes(
    task: Task, documents: Sequence[Document], likelihoods: Sequence[tuple[float, bool]], generated: Sequence[str]
) -> list[Outcome]:
    """Return the outcome of every document, with its generated text compared with the expected answer."""
    outcomes, start = [], 0
    for document, text in zip(documents, generated, strict=True):
        part = likelihoods[start : start + len(document.choices)]
        start += len(document.choices)
        matches = task.generates and has_answer(text, document.answer, mathematical=task.is_mathematical)
        outcomes.append(Outcome(tuple(value for value, _ in part), tuple(greedy for _, greedy in part), text, matches))
    return outcomes
