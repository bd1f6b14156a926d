"""Documents of a run's steps, and steps of its documents: blends, several epochs, a resume with another order."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.cli import inspect_run, pretrain
from megatron_slm.config.checkpoint_files import TRACKER
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.corpus.index import bin_path
from megatron_slm.testing.tiny import GLOBAL_BATCH, Outcome, command, launch_each, make_corpus, records, run_each
from megatron_slm.tokenizers.tokenizer import ByteTokenizer, TokenizerFiles
from megatron_slm.training.data_order import SavedRun
from megatron_slm.training.provenance import Provenance
from megatron_slm.training.save_directory import RunRecord, write_record

LENGTH = 32


def blend(directory: Path, **flags: Any) -> list[str]:
    argv = command("BLEND", directory / "run", num_layers=1, objective="slm", slm_score="token-loss", **flags)
    place = argv.index("BLEND")
    argv[place : place + 1] = ["0.5", str(directory / "one_text_document"), "0.5", str(directory / "two_text_document")]
    argv[argv.index("--valid-data-path") + 1] = f"own={directory / 'one_text_document'}"
    return argv


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that was stopped after step 3 and resumed with another seed, and thus another order."""
    directory = tmp_path_factory.mktemp("provenance")
    make_corpus(directory / "one", 1, documents=8)
    make_corpus(directory / "two", 2)
    first = blend(directory, train_iters=6, exit_interval=3)
    launch_each([first, blend(directory, train_iters=6, load=directory / "run", seed=99)])
    return directory


def inspect(workspace: Path, *argvs: list[str]) -> list[Outcome]:
    return run_each(*(["--load", str(workspace / "run"), *argv] for argv in argvs), main=inspect_run.main)


def sources(workspace: Path, step: int) -> dict[str, Any]:
    path = workspace / f"step-{step}.json"
    (outcome,) = inspect(workspace, ["--step", str(step), "--json", str(path)])
    assert outcome.code == 0, outcome.errors
    return json.loads(path.read_text(encoding="utf-8"))


def test_steps_list_the_tokens_that_were_trained_on(workspace: Path) -> None:
    """The replay of a step reports the text of each sample."""
    for step in (2, 5):
        report = workspace / f"replay-{step}.json"
        argv = blend(workspace, train_iters=6, load=workspace / "run", seed=1234 if step < 4 else 99)
        if step < 4:  # before the first checkpoint: from the start of the run
            place = argv.index("--save")
            del argv[place : place + 2]
            del argv[argv.index("--load") : argv.index("--load") + 2]
        (outcome,) = run_each([*argv, "--replay-step", str(step), "--replay-report", str(report)], main=pretrain.main)
        assert outcome.code == 0, outcome.errors
        replayed = json.loads(report.read_text(encoding="utf-8"))["samples"]
        found = sources(workspace, step)
        assert found["samples"] == [(step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH]
        spans: dict[int, list[dict[str, Any]]] = {}
        for source in found["sources"]:
            spans.setdefault(source["sample"], []).append(source)
        for sample in replayed:
            listed = spans[sample["sample"]]
            names = ("corpus", "document", "offset", "tokens")
            assert [{name: span[name] for name in names} for span in listed] == sample["documents"]
            ids = [
                np.fromfile(bin_path(span["corpus"]), np.uint16)[slice(*(byte // 2 for byte in span["bytes"]))]
                for span in listed
            ]
            text = bytes(token for token in np.concatenate(ids)[:-1].tolist() if token < 256).decode()
            assert text == sample["text"]
        (outcome,) = inspect(workspace, ["--step", str(step), "--replay-report", str(report)])
        assert outcome.code == 0, outcome.errors
        selected = sum(sample["selected"] for sample in replayed)
        shown = [line for line in outcome.output.splitlines() if " selected (" in line]
        counted = sum(int(line.split(" tokens, ")[1].split(" selected")[0].replace(",", "")) for line in shown)
        assert len(shown) == 2 and counted == selected
        share = records(workspace / "run")[step - 1]["share_selected"]
        assert selected == round(share * GLOBAL_BATCH * LENGTH)


def test_documents_list_exactly_the_steps_that_read_them(workspace: Path) -> None:
    """The first corpus is read several times."""
    expected: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for step in range(1, 7):
        for source in sources(workspace, step)["sources"]:
            name = Path(source["corpus"]).name
            expected.setdefault((name, source["document"]), []).append((step, source["sample"]))
    documents = [("one_text_document", 0), ("one_text_document", 7), ("two_text_document", 3)]
    assert any(len(expected.get(document, [])) > 6 for document in documents)
    paths = [workspace / f"document-{number}.json" for number in range(len(documents))]
    outcomes = inspect(
        workspace,
        *(
            ["--document", f"{name}:{number}", "--json", str(path)]
            for (name, number), path in zip(documents, paths, strict=True)
        ),
    )
    for document, path, outcome in zip(documents, paths, outcomes, strict=True):
        assert outcome.code == 0, outcome.errors
        found = json.loads(path.read_text(encoding="utf-8"))["occurrences"]
        assert [(each["step"], each["sample"]) for each in found] == expected.get(document, [])


def test_a_corpus_of_two_spellings_is_one(workspace: Path) -> None:
    """A resumed run may name its corpora by other paths."""
    tokenizer = ByteTokenizer(TokenizerFiles())
    provenance = Provenance.open(str(workspace / "run"), None, tokenizer)
    first, *others = provenance.saved.orders
    spelled = [each.replace(str(workspace), f"{workspace}/../{workspace.name}") for each in first.data["data_path"]]
    assert others and spelled != first.data["data_path"]
    orders = [replace(first, data={**first.data, "data_path": spelled}), *others]
    respelled = replace(provenance, saved=replace(provenance.saved, orders=orders))
    for number in (0, 7):
        expected, found = (
            [(step, source.sample, source.tokens) for step, source in each.steps_of("one_text_document", number)]
            for each in (provenance, respelled)
        )
        assert found == expected


def test_unrecorded_selection_has_a_remedy(workspace: Path) -> None:
    (outcome,) = inspect(workspace, ["--step", "5", "--max-samples", "1"])
    assert outcome.code == 0, outcome.errors
    assert "--replay-step 5 --replay-report FILE" in outcome.output and "and 15 more" in outcome.output
    assert outcome.output.count("sample ") == 1


def test_a_moved_run_has_its_own_metrics(workspace: Path) -> None:
    """Another run may have taken the former directory."""
    moved, step = workspace / "moved", ["--step", "5", "--max-samples", "1"]
    shutil.copytree(workspace / "run", moved)
    lines = (moved / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    changed = [json.dumps({**json.loads(line), "loss": 1.25}) + "\n" for line in lines]
    (moved / "metrics.jsonl").write_text("".join(changed), encoding="utf-8")
    argvs = [["--load", str(directory), *step] for directory in (moved, workspace / "run")]
    outcomes = run_each(*argvs, main=inspect_run.main)
    assert "logged: loss 1.2500" in outcomes[0].output and "loss 1.2500" not in outcomes[1].output


def test_metrics_and_events_of_other_releases_are_used_as_far_as_they_go(workspace: Path) -> None:
    moved = workspace / "older"
    shutil.copytree(workspace / "run", moved)
    logged = records(moved)
    del logged[4]["share_selected"], logged[3]["tokens"]
    logged[4]["grad_norm"], logged[5]["loss"] = float("nan"), None
    (moved / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in logged), encoding="utf-8")
    samples = [{"sample": sample, "tokens": LENGTH, "selected": 8} for sample in range(64, 80)]
    events = [{"samples": samples}, {"samples": [{"sample": 64}]}, {"samples": 5}, {}]
    lines = [json.dumps({"kind": "event", "step": 5, "event": "spike", **event}) + "\n" for event in events]
    (moved / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    path = workspace / "older.json"
    argvs = [["--step", "5", "--json", str(path)], ["--step", "6"], ["--step", "4"]]
    outcomes = run_each(*(["--load", str(moved), *argv] for argv in argvs), main=inspect_run.main)
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    assert f"logged: loss {logged[4]['loss']:.4f}\n" in outcomes[0].output and "logged" not in outcomes[1].output
    assert outcomes[0].output.count(" selected (25.0%)") == 2
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert content["metrics"]["grad_norm"] == "nan"


def test_selections_of_another_order_are_not_those_of_the_step(workspace: Path, tmp_path: Path) -> None:
    """Events of the steps before a resume, and reports of other runs, have samples of the same numbers."""
    moved = tmp_path / "moved"
    shutil.copytree(workspace / "run", moved)
    documents: dict[int, list[dict[str, Any]]] = {}
    for source in sources(workspace, 5)["sources"]:
        span = {name: source[name] for name in ("corpus", "document", "offset", "tokens")}
        documents.setdefault(source["sample"], []).append(span)
    ours = [
        {"sample": sample, "tokens": LENGTH, "selected": 8, "documents": spans} for sample, spans in documents.items()
    ]
    theirs = [
        {**sample, "selected": 16, "documents": ours[place - 1]["documents"]} for place, sample in enumerate(ours)
    ]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"kind": "replay", "step": 5, "samples": theirs}), encoding="utf-8")
    argv = ["--load", str(moved), "--step", "5"]
    found = []
    for events in ([ours, theirs], [theirs]):
        lines = [json.dumps({"kind": "event", "step": 5, "samples": samples}) + "\n" for samples in events]
        (moved / "events.jsonl").write_text("".join(lines), encoding="utf-8")
        found += run_each(argv, [*argv, "--replay-report", str(report)], main=inspect_run.main)
    assert found[0].output.count(" selected (25.0%)") == 2, found[0]
    assert "the run did not record the selection" in found[2].output
    assert all(each.code == 2 and "has other samples or documents" in each.errors for each in found[1::2])


def test_logged_means_are_those_of_the_interval_at_the_step(workspace: Path, tmp_path: Path) -> None:
    """A resumed run may log more often than before."""
    moved = tmp_path / "moved"
    shutil.copytree(workspace / "run", moved)
    logged = [record for record in records(moved) if record["step"] in (3, 5, 6)]
    (moved / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in logged), encoding="utf-8")
    argvs = [["--load", str(moved), "--step", str(step)] for step in (3, 5, 6)]
    outputs = [outcome.output for outcome in run_each(*argvs, main=inspect_run.main)]
    assert "logged: " in outputs[0] and "logged (means of up to 2 steps): " in outputs[1] and "logged: " in outputs[2]


def test_relative_record_files_are_those_of_the_working_directory_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_settings(RunConfig(), {"slm_metrics_file": "m.jsonl", "slm_events_file": "e.jsonl"})
    (tmp_path / "run" / "iter_0000002").mkdir(parents=True)
    (tmp_path / "run" / TRACKER).write_text("2\n")
    (tmp_path / "m.jsonl").touch()
    run = Provenance(SavedRun(tmp_path / "run" / "iter_0000002", config, {}, (), ()), Any, Any)  # type: ignore[arg-type]
    assert run.config.logging.slm_metrics_file == "m.jsonl"
    monkeypatch.chdir(tmp_path)
    write_record(tmp_path / "run", RunRecord.new(None), config)
    monkeypatch.chdir("/")
    logging = run.config.logging
    assert (logging.slm_metrics_file, logging.slm_events_file) == (str(tmp_path / "m.jsonl"), "e.jsonl")


def test_batch_sizes_that_grew_before_a_resume_are_those_of_the_metrics(workspace: Path, tmp_path: Path) -> None:
    """The resumed run has a constant batch size."""
    save = ["--save", str(tmp_path / "run")]
    growing = [*blend(workspace, train_iters=5, exit_interval=4, rampup_batch_size=[8, 8, 16]), *save]
    launch_each([growing, [*blend(workspace, train_iters=5, load=tmp_path / "run"), *save]])
    ends = [0, *(record["tokens"] // LENGTH for record in records(tmp_path / "run"))]
    assert ends[1] - ends[0] < ends[4] - ends[3]
    paths = [tmp_path / f"{step}.json" for step in range(1, 6)]
    argvs = [
        ["--load", str(tmp_path / "run"), "--step", str(step), "--json", str(path)]
        for step, path in enumerate(paths, 1)
    ]
    for path, start, stop, outcome in zip(paths, ends, ends[1:], run_each(*argvs, main=inspect_run.main), strict=False):
        assert outcome.code == 0, outcome.errors
        assert json.loads(path.read_text(encoding="utf-8"))["samples"] == [start, stop]


def test_steps_on_mock_data_have_no_documents(workspace: Path, tmp_path: Path) -> None:
    resumed = [*blend(workspace, train_iters=2, load=tmp_path), "--save", str(tmp_path)]
    mock = ["--mock-data", *resumed, "--exit-interval", "1"]
    for name, count in (("--data-path", 4), ("--valid-data-path", 1), ("--split", 1)):
        place = mock.index(name)
        del mock[place : place + 1 + count]
    launch_each([mock, resumed])
    argvs = [["--load", str(tmp_path), *argv] for argv in (["--step", "1"], ["--document", "one_text_document:1"])]
    step, document = run_each(*argvs, main=inspect_run.main)
    assert step.code == 2 and "--step 1: the run trained on mock data in this step" in step.errors
    assert document.code == 0 and "of the 2 steps" in document.output


def test_refusals(workspace: Path) -> None:
    report, other = workspace / "other.json", workspace / "text.json"
    report.write_text(json.dumps({"kind": "replay", "step": 4, "samples": []}), encoding="utf-8")
    other.write_text("text", encoding="utf-8")
    foreign = workspace / "foreign.json"
    foreign.write_text(json.dumps({"kind": "replay", "step": 5, "samples": []}), encoding="utf-8")
    broken = [workspace / f"broken-{number}.json" for number in range(3)]
    for path, samples in zip(broken, (None, [1], [{"sample": 64, "tokens": "x", "selected": 1}]), strict=True):
        path.write_text(json.dumps({"kind": "replay", "step": 5, "samples": samples}), encoding="utf-8")
    cases = [
        ([], "give one of --step N and --document"),
        (["--step", "1", "--document", "one:1"], "give one of --step N and --document"),
        (["--step", "7"], "the run has the steps 1 to 6"),
        (["--step", "0"], "the run has the steps 1 to 6"),
        (["--document", "one"], "expected CORPUS:NUMBER"),
        (["--document", "three:1"], "three is not a corpus of the run"),
        (["--document", "one_text_document:8"], "the documents 0 to 7"),
        (["--step", "5", "--replay-report", str(report)], "is the report of step 4"),
        (["--step", "5", "--replay-report", str(other)], "is not a report of --replay-step"),
        (["--step", "5", "--replay-report", str(foreign)], "has other samples or documents than step 5 of this run"),
        *((["--step", "5", "--replay-report", str(path)], "is not a report of --replay-step") for path in broken),
        (["--step", "5", "--json", str(workspace / "no" / "a.json")], "does not exist. Create it"),
        (["--step", "5", "--json", str(other)], "was not written by megatron_slm"),
    ]
    (workspace / "published").mkdir()
    (workspace / "published" / "config.json").write_text("{}", encoding="utf-8")
    cases.append((["--step", "1", "--load", str(workspace / "published")], "has weights only"))
    for (_, message), outcome in zip(cases, inspect(workspace, *(argv for argv, _ in cases)), strict=True):
        assert outcome.code == 2 and message in outcome.errors, (message, outcome.errors)
