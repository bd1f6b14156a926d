"""The same requests on lm-evaluation-harness's Hugging Face backend and on our model: likelihoods, texts and scores."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from evaluation_samples import write_requests
from tokenizers.processors import TemplateProcessing

from megatron_slm.cli.convert_checkpoint import main as convert
from megatron_slm.evaluation.documents import Continuation, Prompt
from megatron_slm.evaluation.evaluate import TaskResult, evaluate_tasks
from megatron_slm.evaluation.harness import Harness
from megatron_slm.evaluation.report import write_results
from megatron_slm.evaluation.runner import RequestRunner
from megatron_slm.evaluation.selection import read_tasks
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.inference import opened
from megatron_slm.testing.published import save_model
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import launch
from megatron_slm.testing.tokenizer_models import byte_level_model, random_lines

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'megatron_slm[evaluation]'")
pytest.importorskip("accelerate", reason="needs accelerate, which lm-eval's Hugging Face backend imports")
CONTEXT = 64  # of the model
NEW = 6  # generated tokens


class Model(NamedTuple):
    checkpoint: Path
    published: Path  # the same model for transformers


@pytest.fixture(scope="module", params=["plain tokenizer", "tokenizer adds bos", "trained and exported"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Write a random Llama with a byte-level tokenizer, as transformers writes them; or train and export it."""
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("published")
    tokenizer = byte_level_model(1)
    bos = tokenizer.token_to_id("<s>")
    adds_bos = request.param == "tokenizer adds bos"
    if adds_bos:
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokens = {"eos_token": "</s>", "bos_token": "<s>"} if adds_bos else {"eos_token": "<|endoftext|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    save_model("llama", directory, vocab_size=len(wrapped), bos_token_id=bos, eos_token_id=wrapped.eos_token_id)
    wrapped.save_pretrained(directory)  # instead of the tokenizer of save_model
    assert len(wrapped("a").input_ids) == 1 + adds_bos
    return _trained(directory) if request.param == "trained and exported" else Model(directory, directory)


def _trained(start: Path) -> Model:
    """Train a published model for a few steps, and export the checkpoint."""
    checkpoint, published = start / "run", start / "export"
    argv = ["--load", str(start), "--mock-data", "--seq-length", "32", "--train-iters", "3", "--lr", "1e-2"]
    argv += ["--micro-batch-size", "2", "--global-batch-size", "4", "--num-workers", "0", "--eval-iters", "0"]
    launch([*argv, "--save", str(checkpoint)])
    assert convert(["export", "--load", str(checkpoint), "--hf-path", str(published)]) == 0
    return Model(checkpoint, published)


def texts(seed: int, count: int, longest: int) -> list[str]:
    rng = random.Random(seed)
    return [line[: rng.randint(3, longest)].strip() for line in random_lines(seed, count)]


CONTEXTS = ["", "one ", *texts(3, 12, 30), *texts(4, 3, 400)]
REQUESTS = [
    (context, joint + text)
    for context, text in zip(CONTEXTS, texts(5, len(CONTEXTS), 25), strict=True)
    for joint in (" ", "", "\n")
]
ROLLING = [*texts(6, 4, 300), "a"]
PROMPTS = [text or "a" for text in texts(7, 5, 300)]


def documents() -> list[dict[str, Any]]:
    rng = random.Random(8)
    words = texts(9, 30, 12)
    return [
        {"question": f"Question: {text}\nAnswer:", "choices": rng.sample(words, 4), "gold": rng.randrange(4)}
        for text in texts(10, 20, 40)
    ]


def definitions(path: Path) -> list[dict[str, Any]]:
    """Return a task of each kind in lm-eval's format, over the documents in a file."""
    path.write_text("".join(json.dumps(document) + "\n" for document in documents()))
    files = {"data_files": {"test": str(path)}, "cache_dir": str(path.parent / "cache")}
    data = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    common = {**data, "doc_to_text": "{{question}}"}
    return [
        {
            **common,
            "task": "choices",
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            **data,
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "task": "texts",
            "output_type": "loglikelihood_rolling",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        {
            **common,
            "doc_to_target": "{{choices[0]}}",
            "task": "answers",
            "output_type": "generate_until",
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW, "do_sample": False},
        },
    ]


class Ours(NamedTuple):
    likelihoods: list[tuple[float, bool]]
    rolling: list[float]
    generated: list[str]
    harness: list[TaskResult]
    files: list[TaskResult]


def _ours(rank: int, world_size: int, directory: str, data: str) -> Ours:
    harness = _small_harness()
    tasks, _ = read_tasks(["choices"], data)
    with opened(directory) as model:
        runner = RequestRunner(model, batch_size=4)
        loaded = [harness.load(definition) for definition in definitions(Path(data) / "documents.json")]
        return Ours(
            runner.log_likelihoods([Continuation(*request) for request in REQUESTS], ""),
            runner.rolling_log_likelihoods(ROLLING, ""),
            runner.generate([Prompt(prompt, ("e",), NEW) for prompt in PROMPTS], ""),
            harness.evaluate(runner, loaded),
            evaluate_tasks(runner, tasks),
        )


def _small_harness() -> Harness:
    """Return a harness without the index of lm-eval's tasks, which takes long to build."""
    import lm_eval.tasks

    original = lm_eval.tasks.TaskManager
    lm_eval.tasks.TaskManager = functools.partial(original, include_defaults=False)  # type: ignore[misc, assignment]
    try:
        return Harness()
    finally:
        lm_eval.tasks.TaskManager = original  # type: ignore[misc]


def test_results_equal_those_of_the_hugging_face_backend(model: Model, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    lines = [
        {"doc_id": number, "label": document["gold"], "request": {"context": document["question"], "continuation": c}}
        for number, document in enumerate(documents())
        for c in (f" {choice}" for choice in document["choices"])
    ]
    write_requests(tmp_path / "choices.jsonl", lines)
    [ours] = run_ranks(_ours, 1, str(model.checkpoint), str(tmp_path), initialize=False)

    reference = HFLM(pretrained=str(model.published), device="cpu", dtype="float32", batch_size=3)
    assert reference.max_length == CONTEXT

    def instances(kind: str, requests: list[Any]) -> list[Any]:
        return [Instance(kind, {}, arguments, index) for index, arguments in enumerate(requests)]

    expected = reference.loglikelihood(instances("loglikelihood", REQUESTS), disable_tqdm=True)
    for request, (value, greedy), (theirs, theirs_greedy) in zip(REQUESTS, ours.likelihoods, expected, strict=True):
        assert value == pytest.approx(theirs, abs=1e-4), request
        assert greedy == theirs_greedy
    rolling = reference.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in ROLLING]))
    assert ours.rolling == pytest.approx(rolling, abs=1e-3)
    settings = {"until": ["e"], "max_gen_toks": NEW, "do_sample": False}
    assert ours.generated == reference.generate_until(
        instances("generate_until", [(prompt, settings) for prompt in PROMPTS])
    )
    results: dict[str, Any] = {}
    harness = _small_harness()
    for definition in definitions(tmp_path / "documents.json"):
        results |= evaluate(reference, harness.load(definition), log_samples=False)["results"]
    assert [result.task for result in ours.harness] == list(results) == ["choices", "texts", "answers"]
    for result in ours.harness:
        for metric, score in result.scores.items():
            assert score.value == pytest.approx(results[result.task][f"{metric},none"], abs=1e-5), metric
    [choices] = ours.files
    for metric in ("acc", "acc_norm"):
        assert choices.scores[metric].value == results["choices"][f"{metric},none"]
        assert choices.scores[metric].stderr == pytest.approx(results["choices"][f"{metric}_stderr,none"])
    assert {score.count for score in choices.scores.values()} == {20}
    write_results(str(tmp_path / "scores.json"), [*ours.harness, choices], (), {})
    table = make_table(json.loads((tmp_path / "scores.json").read_text()))
    assert "|answers" in table and "|exact_match" in table and f"{choices.scores['acc'].value:.4f}" in table


def test_tasks_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    definition = definitions(tmp_path / "documents.json")[0]
    harness = _small_harness()
    with pytest.raises(ConfigError, match=r"task choices runs code that the model generates.*--confirm-run-unsafe"):
        harness.load({**definition, "unsafe_code": True})
    definition["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "missing.json")}}
    with pytest.raises(ConfigError, match=r"task choices cannot be loaded by lm-evaluation-harness: .*missing.json"):
        harness.load(definition)
