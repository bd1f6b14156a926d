"""A short version of ``make smollm2`` with a tiny model; its commands run on ranks that have imported everything."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "smollm2"))

import continue_pretraining
import corpora
import results_table
import stages
import study
from evaluation_samples import choice_lines, write_requests

from megatron_slm.testing.published import save_model
from megatron_slm.testing.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def _command(rank: int, world_size: int, command: Sequence[str], directory: str) -> tuple[int, str]:
    """Run a command of the example on this rank, and return its exit code and output."""
    output = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if "megatron_slm.pretrain" in command:
            code = import_module("megatron_slm.cli.pretrain").main(
                command[command.index("megatron_slm.pretrain") + 1 :]
            )
        elif command[1] == "-c":
            sys.path.insert(0, str(ROOT / "examples" / "smollm2"))
            compared = import_module("published_model").compare_with_transformers(*command[3:], "the dog and her hat")
            print(json.dumps(compared))
            code = 0
        else:
            sys.argv = list(command[1:])
            code = import_module(f"megatron_slm.cli.{Path(command[1]).stem}").main()
    return code, output.getvalue()


def run(command: Sequence[str], **options: Any) -> None:
    """Run a command as ``stages.run`` does, on ranks that have imported everything."""
    ranks = 2 if "--nproc-per-node=2" in command else 1
    results = run_ranks(_command, ranks, list(command), str(ROOT), initialize=False)
    for code, output in results:
        assert code == 0, output
    if "stdout" in options:
        options["stdout"].write(results[0][1])
        options["stdout"].flush()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Return the command line of a short example: a tiny model, few documents and one benchmark."""
    source = sorted(Path(contextlib.__file__).parent.glob("[a-d]*.py"))
    monkeypatch.setattr(corpora, "_source_files", lambda directories: iter(source))
    monkeypatch.setattr(corpora, "_crawled_files", lambda: iter(sorted(Path(json.__file__).parent.glob("*.py"))))
    monkeypatch.setattr(corpora, "RAW_VALID_DOCUMENTS", 1)
    monkeypatch.setattr(stages, "run", run)
    save_model("llama-tied", tmp_path / "model")
    write_requests(tmp_path / "tasks" / "piqa.jsonl", choice_lines(2))
    sizes = ["--steps", "4", "--reference-steps", "2", "--seq-length", "32", "--batch-size", "4"]
    return ["--directory", str(tmp_path / "run"), "--model", str(tmp_path / "model"), *sizes]


@pytest.mark.slow
def test_short_version(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small += ["--limit", "2", "--tasks", "piqa", "--tasks-dir", str(tmp_path / "tasks")]
    assert continue_pretraining.main(small) == 0
    result = json.loads((tmp_path / "run" / "smollm2.json").read_text())
    assert result["comparison"]["largest_difference"] < 1e-4
    bits = result["bits_per_byte"]
    assert bits["clm"]["raw"] < bits["base"]["raw"] and bits["rm"]["clean"] < bits["base"]["clean"]
    assert {score["piqa"]["count"] for score in result["scores"].values()} == {2}
    assert all(sample["text"] for sample in result["samples"].values())
    assert (tmp_path / "run" / "slm-hf" / "model.safetensors").is_file()
    assert "| SLM, raw |" in (tmp_path / "run" / "smollm2.md").read_text()
    capsys.readouterr()
    assert continue_pretraining.main(small) == 0
    assert capsys.readouterr().out.count("already complete") == 22  # every stage is reused


@pytest.mark.slow
def test_studies(small: list[str], tmp_path: Path) -> None:
    results = tmp_path / "results"
    small += ["--results", str(results)]
    assert study.main(["dynamics", *small, "--tokens", "64", "--save-interval", "1"]) == 0
    assert len(json.loads((results / "dynamics.json").read_text())["steps"]) == 4
    assert study.main(["self-reference", *small, "--seeds", "2"]) == 0
    table = (results / "self-reference.md").read_text()
    assert "| union |" in table and table.endswith("Seeds: 2.\n")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--seeds", "0"], "must be at least 1"),
        (["--tokens", "0"], "must be at least 1"),
        (["--save-interval", "-1"], "must be at least 1"),
        (["--batch-size", "0"], "--batch-size is 0, and must be at least 1"),
        (["--steps", "4", "--save-interval", "4"], "dynamics need two"),
    ],
)
def test_wrong_sizes_of_studies_are_refused(flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        study.main(["dynamics", *flags])
    assert stopped.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--steps", "--reference-steps", "--seq-length", "--batch-size", "--limit"])
def test_wrong_sizes_of_the_example_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        continue_pretraining.main([flag, "0"])
    assert stopped.value.code == 2 and f"{flag} is 0, and must be at least 1" in capsys.readouterr().err


def test_unknown_benchmarks_are_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def stage(name: str, *_: Any) -> None:
        ran.append(name)
        if name.startswith("evaluate"):
            raise stages.StageFailed(2)

    monkeypatch.setattr(stages, "stage", stage)
    assert continue_pretraining.main(["--directory", str(tmp_path), "--model", str(tmp_path), "--tasks-dir", "x"]) == 2
    assert not any(name.startswith("train") for name in ran)


def test_samples_may_have_line_separators(tmp_path: Path) -> None:
    """Generated texts are JSON lines, in which characters that splitlines() splits at are not escaped."""
    record = {"prompt": "a", "text": "b\u2028c\x85d"}
    (tmp_path / "base-sample.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert results_table.sample(tmp_path, "base") == record
