"""Test that --replay-step repeats a step bit for bit, reports it, and changes nothing in --save."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.runtime.lock import DirectoryLock
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import LOSSES, captured, command, launch, launch_each, make_corpus, records, run_each

FLAGS = {"train_iters": 8, "save_interval": 3, "eval_iters": 0, "hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank, of a blend with reset positions, and one on two ranks with random selection."""
    directory = tmp_path_factory.mktemp("replay")
    for name, seed in (("a", 1), ("b", 2)):
        make_corpus(directory / name, seed)
    launch_each([one(directory)])
    launch(two(directory), world_size=2)
    return directory


def one(directory: Path, save: Path | None = None, **flags: Any) -> list[str]:
    a, b = (str(directory / f"{name}_text_document") for name in "ab")
    save = save or directory / "one"
    blend = {"data_path": ["0.6", a, "0.4", b], "reset_position_ids": True, "reset_attention_mask": True}
    return command(a, save, **{"load": save, **FLAGS, **blend, **flags})


def two(directory: Path, **flags: Any) -> list[str]:
    slm = {"objective": "slm", "slm_score": "random", "use_distributed_optimizer": True}
    save = directory / "two"
    return command(str(directory / "a_text_document"), save, load=save, **{**FLAGS, "dp": 2, **slm, **flags})


def content(save: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification times and contents; the heartbeat of an active run changes the time of its lock."""
    files = [path for path in save.rglob("*") if path.is_file()]
    times = {path: 0 if path.suffix == ".lock" else path.stat().st_mtime_ns for path in files}
    return {str(path): (time, path.read_bytes()) for path, time in times.items()}


def _rank(rank: int, world_size: int, argv: list[str]) -> tuple[int, str, str]:
    return tuple(captured(argv))


def place(sample: dict[str, Any], step: int, dp: int) -> int:
    """Return the number of the sample in the run that this row of a micro-batch of a rank holds."""
    return 16 * (step - 1) + 8 * sample["micro_batch"] + 8 // dp * sample["rank"] + sample["row"]


def check(report: dict[str, Any], save: Path, step: int, dp: int = 1) -> None:
    (record,) = (record for record in records(save) if record["step"] == step)
    assert report["step"] == step
    assert {name: report[name] for name in LOSSES} == {name: record[name] for name in LOSSES}
    norm = math.sqrt(math.fsum(part**2 for part in report["module_grad_norms"].values()))
    assert norm == pytest.approx(report["grad_norm"], rel=1e-5)
    assert sorted(sample["sample"] for sample in report["samples"]) == list(range(16 * (step - 1), 16 * step))
    assert [sample["sample"] for sample in report["samples"]] == [
        place(sample, step, dp) for sample in report["samples"]
    ]
    losses = [(sample["loss"], sample["tokens"]) for sample in report["samples"]]
    assert losses == sorted(losses, reverse=True)
    mean = math.fsum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    assert mean == pytest.approx(report["loss_all"], rel=1e-12)


def test_replay_of_an_active_run_is_equal_and_changes_nothing(workspace: Path) -> None:
    lock, reports = DirectoryLock(workspace / "one", "--save"), [workspace / f"one-{step}.json" for step in (6, 7)]
    lock.acquire()
    try:
        before = content(workspace / "one")
        six, seven = run_each(
            one(workspace, replay_step=6, replay_report=reports[0], slm_overwrite_save=True),
            one(workspace, replay_step=7, replay_report=reports[1], slm_log_dir=workspace / "one" / "logs"),
        )
        assert content(workspace / "one") == before
    finally:
        lock.release()
    for outcome, path, step, start in ((six, reports[0], 6, 3), (seven, reports[1], 7, 6)):
        assert outcome.code == 0, outcome.errors
        report = json.loads(path.read_text())
        check(report, workspace / "one", step)
        assert f"iter_{start:07d}" in outcome.output and "equal to " in outcome.output
        documents = [span for sample in report["samples"] for span in sample["documents"]]
        assert {Path(span["corpus"]).name[0] for span in documents} == {"a", "b"}
        assert all(sample["text"] and sample["text"][:30] in outcome.output for sample in report["samples"])
    assert "embedding.word_embeddings" in report["module_grad_norms"]
    assert len([name for name in report["module_grad_norms"] if name.endswith("self_attention")]) == 4


def test_replay_on_two_ranks_is_equal_and_on_one_equal_up_to_rounding(workspace: Path) -> None:
    path, path_of_one = workspace / "two.json", workspace / "two-on-one.json"
    outcomes = run_ranks(_rank, 2, two(workspace, replay_step=5, replay_report=path), initialize=False)
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    report = json.loads(path.read_text())
    check(report, workspace / "two", 5, dp=2)
    assert {sample["rank"] for sample in report["samples"]} == {0, 1} and len(report["rank_grad_norms"]) == 2
    (other,) = run_each(two(workspace, dp=1, replay_step=5, replay_report=path_of_one))
    assert other.code == 0 and "the layout differs" in other.output, other.errors
    report_of_one = json.loads(path_of_one.read_text())
    assert report_of_one["loss_all"] == pytest.approx(report["loss_all"], abs=0.2)  # another dropout
    documents = [{each["sample"]: each["documents"] for each in of["samples"]} for of in (report, report_of_one)]
    assert documents[0] == documents[1]


def test_replay_from_the_start_and_refused_steps(workspace: Path) -> None:
    path = workspace / "start.json"
    foreign = workspace / "notes.txt"
    foreign.write_text("notes")
    argv = one(workspace, replay_step=2, replay_report=path)
    for flag in ("--save", "--load"):
        place = argv.index(flag)
        argv = argv[:place] + argv[place + 2 :]
    start, *refused = run_each(
        argv,
        one(workspace, replay_step=3),
        one(workspace, replay_step=8, ckpt_step=8),
        one(workspace, replay_step=9),
        one(workspace, replay_step=2, load=workspace / "one" / "iter_0000003", save=workspace / "new"),
        one(workspace, skip_train=True, replay_step=8),
        one(workspace, replay_report=path),
        one(workspace, replay_step=6, replay_report=foreign),
        one(workspace, workspace / "none", replay_step=2, replay_report=path),
    )
    assert start.code == 0 and "new run, not saved" in start.output, start.errors
    check(json.loads(path.read_text()), workspace / "one", 2)
    messages = (
        "--replay-step 3 needs a checkpoint of step 2 or earlier",
        "needs a checkpoint of step 7 or earlier, but --ckpt-step is 8",
        "--replay-step 9 is beyond the end of the run, --train-iters 8",
        "--replay-step 2 needs a checkpoint of step 1 or earlier, and --load is at step 3",
        "--replay-step trains, and --skip-train does not",
        "has no effect without --replay-step",
        f"--replay-report {foreign} exists and was not written by megatron_slm",
    )
    for outcome, message in zip(refused[:-1], messages, strict=True):
        assert outcome.code == 2 and message in outcome.errors and "replayed step" not in outcome.output, outcome
    assert "has the steps 3, 6, 8" in refused[0].errors
    assert refused[-1].code == 0 and not (workspace / "none").exists()  # a run without checkpoints yet
