"""Evaluate tasks whose documents are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.evaluation.answers import has_answer
from megatron_slm.evaluation.documents import Prompt, Task
from megatron_slm.evaluation.encoding import RequestEncoder
from megatron_slm.evaluation.metrics import Outcome, Score, score_documents
from megatron_slm.evaluation.runner import RequestRunner
from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.errors import ConfigError


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task by metric."""

    task: str
    scores: dict[str, Score]
    fewshot: int | None
    source: str


@dataclass(frozen=True)
class EncodedTask:
    """Hold a task with the token sequences of its continuations."""

    task: Task
    requests: Sequence[ScoringRequest]  # of all choices of all documents


def encode_task(task: Task, encoder: RequestEncoder) -> EncodedTask:
    """Encode the continuations of a task, and check that all requests fit into the model's context.

    Raises:
        ConfigError: a continuation has no tokens, or a request does not fit.
    """
    choices = [choice for document in task.documents for choice in document.choices]
    try:
        if task.generates:
            for prompt in _prompts(task):
                encoder.prompt(prompt.context, prompt.max_new_tokens)
        return EncodedTask(task, [encoder.continuation(choice.context, choice.text) for choice in choices])
    except ValueError as error:  # of a tokenizer with few texts
        raise ConfigError(f"task {task.name}: {error}. Choose another task or checkpoint.") from error
    except ConfigError as error:
        raise ConfigError(f"task {task.name}: {error}") from error


def evaluate_tasks(runner: RequestRunner, tasks: Sequence[Task]) -> list[TaskResult]:
    """Return the scores of tasks, on every rank. Collective over all ranks.

    Raises:
        ConfigError: a request does not fit into the model's context.
    """
    return [evaluate_task(runner, encoded) for encoded in [encode_task(task, runner.encoder) for task in tasks]]


def evaluate_task(runner: RequestRunner, encoded: EncodedTask) -> TaskResult:
    """Return the scores of a task, on every rank. Collective over all ranks.

    Raises:
        Stopped: the runner must stop.
    """
    task = encoded.task
    likelihoods = runner.score(encoded.requests, task.name)
    generated = runner.generate(_prompts(task), task.name) if task.generates else [""] * len(task.documents)
    outcomes = on_first_rank(lambda: _outcomes(task, likelihoods, generated))
    return TaskResult(task.name, score_documents(task.documents, outcomes, task.metrics), task.fewshot, task.source)


def _prompts(task: Task) -> list[Prompt]:
    """Return the prompts of all documents of a task that generates text."""
    prompts = [document.prompt for document in task.documents if document.prompt is not None]
    assert len(prompts) == len(task.documents), "metrics are those that every document allows"
    return prompts


def _outcomes(task: Task, likelihoods: Sequence[tuple[float, bool]], generated: Sequence[str]) -> list[Outcome]:
    """Return the outcome of every document, with its generated text compared with the expected answer."""
    outcomes, start = [], 0
    for document, text in zip(task.documents, generated, strict=True):
        part = likelihoods[start : start + len(document.choices)]
        start += len(document.choices)
        matches = task.generates and has_answer(text, document.answer, mathematical=task.is_mathematical)
        outcomes.append(Outcome(tuple(value for value, _ in part), tuple(greedy for _, greedy in part), text, matches))
    return outcomes
