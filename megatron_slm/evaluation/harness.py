"""Adapter to lm-evaluation-harness (the package lm-eval): its tasks, with its data, on our models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from megatron_slm.evaluation.documents import Continuation, Prompt
from megatron_slm.evaluation.evaluate import TaskResult
from megatron_slm.evaluation.metrics import Score
from megatron_slm.evaluation.runner import RequestRunner
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.logs import only_errors

MAX_NEW_TOKENS = 256  # if a task states no limit, as in lm-eval
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names in lm-eval, first wins
FEWSHOT_SEED = 1234  # lm-eval's default


def check_harness_is_installed() -> None:
    """Raise ConfigError unless lm-eval is installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks without --tasks-dir needs lm-evaluation-harness, which is not installed. Run pip install "
            "'megatron_slm[evaluation]', or give the data with --tasks-dir."
        )


def make_harness_model(runner: RequestRunner) -> Any:
    """Return a subclass of lm-eval's LM that runs requests with ``runner``.

    Every rank evaluates all requests of a task; the runner divides them among data-parallel ranks.
    """
    from lm_eval.api.model import LM

    class HarnessModel(LM):
        """Run the requests of lm-evaluation-harness on a model of any layout."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return runner.log_likelihoods([Continuation(*request.args) for request in requests], "log-likelihoods")

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return runner.rolling_log_likelihoods([request.args[0] for request in requests], "log-likelihoods")

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return runner.generate([_prompt(*request.args) for request in requests], "lm-eval")

    return HarnessModel()


def _prompt(context: str, settings: dict[str, Any]) -> Prompt:
    """Return the prompt of a generation request.

    Raises:
        ConfigError: the task samples.
    """
    samples = settings.get("do_sample")
    if samples or (samples is None and settings.get("temperature")):  # temperature has no effect without do_sample
        raise ConfigError("a task samples its texts (do_sample), but evaluation is greedy. Leave the task out.")
    until = settings.get("until") or []
    stop = tuple(filter(None, [until] if isinstance(until, str) else until))
    limits = [settings[name] for name in LIMITS if settings.get(name) is not None]
    return Prompt(context, stop, int(limits[0]) if limits else MAX_NEW_TOKENS)


class Harness:
    """Tasks of lm-evaluation-harness, whose index takes some seconds to build.

    Args:
        runs_code: allow tasks that run generated code.
    """

    def __init__(self, *, runs_code: bool = False) -> None:
        from lm_eval.tasks import TaskManager

        self._runs_code = runs_code
        with only_errors("lm_eval"):
            self._manager = TaskManager()

    def names(self) -> list[str]:
        """Return the names of all tasks and groups."""
        return list(self._manager.all_tasks)

    def load(self, task: str | dict[str, Any], fewshot: int | None = None) -> Any:
        """Load a task or group with its data.

        Args:
            task: name of a task or group, or the definition of a task.
            fewshot: examples in each context, except in tasks that are defined without; None for the default.

        Raises:
            ConfigError: the data cannot be downloaded, or the task runs code without permission.
        """
        name = task if isinstance(task, str) else task["task"]
        try:
            with only_errors("lm_eval"):
                loaded = self._manager.load([task])
        except Exception as error:  # of any library that the definition of the task uses
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ConfigError(
                f"task {name} cannot be loaded by lm-evaluation-harness: {reason}. Check the connection to the Hugging "
                "Face Hub, set HF_HOME to a directory that has the data, or give them with --tasks-dir."
            ) from error
        tasks = loaded["tasks"].values()
        if not self._runs_code and any(getattr(member, "UNSAFE_CODE", False) for member in tasks):
            raise ConfigError(
                f"task {name} runs code that the model generates. Allow it with --confirm-run-unsafe-code in an "
                "isolated environment, or leave the task out."
            )
        for member in tasks:
            default = member.get_config("num_fewshot")
            if default is None or (fewshot is not None and default != 0):
                member.set_config(key="num_fewshot", value=fewshot or 0)
            member.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded

    def evaluate(self, runner: RequestRunner, tasks: Sequence[Any], limit: int | None = None) -> list[TaskResult]:
        """Return the scores of loaded tasks, those of a group first. Collective over all ranks.

        Args:
            runner: runs the requests.
            tasks: results of :meth:`load`.
            limit: evaluate only the first documents of each task.
        """
        from lm_eval.evaluator import evaluate

        model, results = make_harness_model(runner), list[TaskResult]()
        for loaded in tasks:
            with only_errors("lm_eval"):
                found = evaluate(model, loaded, limit=limit, log_samples=False, confirm_run_unsafe_code=self._runs_code)
            results += on_first_rank(partial(_results, found))
        return results


def _results(results: dict[str, Any]) -> list[TaskResult]:
    """Return the results of lm-eval, without metrics that are not numbers."""
    found = []
    for name, values in {**results.get("groups", {}), **results["results"]}.items():
        counts = results["n-samples"]
        members = results.get("group_subtasks", {}).get(name) or [name]
        count = sum(counts[member]["effective"] for member in members if member in counts)
        shots = {results["n-shot"].get(member) for member in members}
        fewshot = shots.pop() if len(shots) == 1 else None
        found.append(TaskResult(name, dict(_scores(values, count)), fewshot, "lm-evaluation-harness"))
    return [result for result in found if result.scores]


def _scores(values: dict[str, Any], count: int) -> Iterator[tuple[str, Score]]:
    """Yield the scores of a task, whose keys in lm-eval are METRIC,FILTER."""
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        yield name, Score(float(value), float(stderr) if isinstance(stderr, int | float) else None, count)
