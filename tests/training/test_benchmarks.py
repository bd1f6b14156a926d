"""Benchmarks during training: scores of the training model, which does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import choice_lines, generation_lines, write_package, write_requests

from megatron_slm.testing.tiny import command, launch, launch_each, losses, make_corpus, records, run_each
from megatron_slm.training.sinks import scalars

TASKS = ["piqa", "lambada_openai", "gsm8k"]
RUN: dict[str, Any] = {"seq_length": 64, "num_layers": 2, "train_iters": 4, "eval_interval": 2}
SPLIT: dict[str, Any] = {"context_parallel_size": 2}


def test_scores_are_logged_and_training_is_unchanged(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    corpus, package = make_corpus(tmp_path / "corpus", 1), write_package(tmp_path / "package")
    benchmarks = {"eval_tasks": TASKS, "tasks_dir": package, "eval_tasks_limit": 3}
    plain, measured, board = (tmp_path / name for name in ("plain", "measured", "board"))
    again, split = tmp_path / "again.jsonl", tmp_path / "split.jsonl"
    evaluation: dict[str, Any] = {**RUN, **benchmarks, "load": measured, "skip_train": True, "eval_iters": 0}
    launch_each(
        [
            command(corpus, plain, **RUN, attention_dropout=0.1),
            command(corpus, measured, **RUN, attention_dropout=0.1, **benchmarks, tensorboard_dir=board),
            command(corpus, **evaluation, slm_metrics_file=again),
        ]
    )
    launch(command(corpus, **evaluation, **SPLIT, slm_metrics_file=split), world_size=2)
    metrics = measured / "metrics.jsonl"
    complete = metrics.read_text()
    metrics.write_text("".join(complete.splitlines(keepends=True)[:-1]))  # stopped before the last benchmark
    launch(command(corpus, measured, load=measured, **RUN, attention_dropout=0.1, **benchmarks))
    assert metrics.read_text() == complete

    assert losses(plain) == losses(measured) and records(plain, "eval") == records(measured, "eval")
    found = records(measured, "task")
    assert [(record["step"], record["set"]) for record in found] == [
        (step, task) for step in (0, 2, 4) for task in TASKS
    ]
    assert {"acc", "acc_norm", "acc_norm_stderr"} < found[0].keys() and found[0]["documents"] == 3
    assert "exact_match" not in found[2]
    assert found[2]["bits_per_byte"] > found[-1]["bits_per_byte"] > 0
    assert "task/piqa/acc" in scalars(found[0])
    [events] = board.iterdir()
    assert b"task/gsm8k/bits_per_byte" in events.read_bytes()
    assert [json.loads(line) for line in again.read_text().splitlines()] == found[-3:]
    for record, other in zip(found[-3:], map(json.loads, split.read_text().splitlines()), strict=True):
        assert {name: value for name, value in other.items() if name not in record} == {}
        for name, value in record.items():
            assert other[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_mistakes_become_messages(tmp_path: Path) -> None:
    corpus, tasks = make_corpus(tmp_path / "corpus", 1), tmp_path / "tasks"
    write_requests(tasks / "colors.jsonl", choice_lines())
    texts = [{**line, "request": {**line["request"], "continuation": "x" * 99}} for line in choice_lines()]
    write_requests(tasks / "long.jsonl", texts)
    prompts = generation_lines()
    for line in prompts:
        del line["request"]["continuation"]
    write_requests(tasks / "prompts.jsonl", prompts)
    given: dict[str, Any] = {**RUN, "tasks_dir": tasks}
    cases = {
        "--eval-tasks needs --tasks-dir": {**RUN, "eval_tasks": "colors"},
        "--tasks-dir has no effect without --eval-tasks": given,
        "has no task color. Similar names: colors": {**given, "eval_tasks": "color"},
        "has 99 tokens, more than the model's context length, 64": {**given, "eval_tasks": "long"},
        "--eval-tasks: task prompts only generates text": {**given, "eval_tasks": "prompts"},
    }
    outcomes = run_each(*(command(corpus, **flags) for flags in cases.values()))
    for message, outcome in zip(cases, outcomes, strict=True):
        assert outcome.code == 2 and message in outcome.errors, (message, outcome)
