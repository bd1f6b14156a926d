"""Benchmarks of a training run (--eval-tasks), evaluated on the training model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megatron_slm.config.schema import RunConfig
from megatron_slm.evaluation.documents import EXACT_MATCH, Task
from megatron_slm.evaluation.encoding import RequestEncoder
from megatron_slm.evaluation.evaluate import EncodedTask, TaskResult, encode_task, evaluate_task
from megatron_slm.evaluation.report import finite
from megatron_slm.evaluation.runner import RequestRunner, Stopped
from megatron_slm.evaluation.selection import read_tasks
from megatron_slm.inference.model import InferenceModel
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import Tokenizer
from megatron_slm.training.evaluation import evaluation_mode
from megatron_slm.training.state import TrainState

FLAG = "--eval-tasks"


def read_benchmarks(config: RunConfig, tokenizer: Tokenizer) -> list[EncodedTask]:
    """Return the tasks of --eval-tasks. Not collective.

    Text is not generated during training: of tasks with reference solutions, only bits per byte are evaluated.

    Raises:
        ConfigError: a task is unknown, damaged, does not fit into the model's context, or only generates text.
    """
    logging = config.logging
    if not logging.eval_tasks or logging.tasks_dir is None:
        return []
    tasks, _ = read_tasks(logging.eval_tasks, logging.tasks_dir, limit=logging.eval_tasks_limit, flag=FLAG)
    encoder = RequestEncoder(tokenizer, config.model.max_position_embeddings)
    return [encode_task(_without_generation(task), encoder) for task in tasks]


def _without_generation(task: Task) -> Task:
    metrics = tuple(metric for metric in task.metrics if metric != EXACT_MATCH)
    if not metrics:
        raise ConfigError(
            f"{FLAG}: task {task.name} only generates text, which training does not do. Evaluate it with "
            "tools/evaluate.py, and leave it out here."
        )
    return replace(task, metrics=metrics)


def evaluate_benchmarks(
    state: TrainState, tasks: Sequence[EncodedTask], config: RunConfig, must_stop: Callable[[], bool]
) -> list[TaskResult]:
    """Return the scores of the training model, on every rank. Collective over all ranks.

    Args:
        state: holds the model, which does not change.
        tasks: result of :func:`read_benchmarks`.
        config: configuration of the run.
        must_stop: collective decision, called before each pass. If it returns True, only the scores of complete tasks
            are returned.
    """
    model = InferenceModel(state.model_chunks, config, state.tokenizer, state.groups)
    runner, results = RequestRunner(model, config.training.micro_batch_size, must_stop), list[TaskResult]()
    with evaluation_mode(state, config):
        try:
            for task in tasks:
                results.append(evaluate_task(runner, task))
        except Stopped:
            pass
    return results


def score_line(result: TaskResult) -> str:
    """Return the scores of a task for the console."""
    return " ".join([result.task, *(f"{metric} {score.value:.4f}" for metric, score in result.scores.items())])


def score_record(result: TaskResult) -> dict[str, Any]:
    """Return the scores and standard errors of a task for the metrics file and other sinks."""
    values: dict[str, Any] = {}
    for metric, score in result.scores.items():
        values |= {metric: finite(score.value), f"{metric}_stderr": finite(score.stderr), "documents": score.count}
    return values
