"""Test that a run survives ten kills, and that the soak test notices a lost checkpoint and a different loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_slm.analysis.soak import Moment, Timing, differences, kill_and_restart, plan_kills
from megatron_slm.cli.soak import main, parse_arguments
from megatron_slm.config.checkpoint_files import TRACKER, Manifest
from megatron_slm.config.paths import METRICS_FILE
from megatron_slm.runtime.checksums import file_checksums, text_checksum
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.tiny import MODEL, make_corpus

TIMING = Timing(start=0.0, step=0.0, save=0.0)


def training(corpus: str, *more: str) -> list[str]:
    argv = [*MODEL, "--data-path", corpus, "--split", "100,0,0", "--valid-data-path", f"own={corpus}"]
    argv += ["--num-layers", "2", "--micro-batch-size", "8", "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    return [*argv, "--train-iters", "14", "--save-interval", "2", "--eval-interval", "7", *more]


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    corpus, result = make_corpus(tmp_path / "corpus", 1), tmp_path / "soak.json"
    argv = ["--directory", str(tmp_path / "runs"), "--kills", "10", "--seed", "3", "--fork", "--output", str(result)]
    assert main([*argv, "--alternate=--async-save", "--", *training(corpus)]) == 0
    record = json.loads(result.read_text())
    assert len(record["kills"]) == 10 and record["steps"] == 14 and not record["problems"]
    assert any(kill["saving"] for kill in record["kills"]) and any(not kill["saving"] for kill in record["kills"])
    newest = [kill["newest_after"] or 0 for kill in record["kills"]]
    assert newest == sorted(newest) and newest[-1] > 0
    for before, after in zip(record["kills"], record["kills"][1:], strict=False):
        assert after["resumed_from"] in (before["newest_after"], None)  # None: killed before the line


class Ended:
    """A start of a run that writes a checkpoint and is then killed."""

    def __init__(self, save: Path, step: int, damage: Callable[[Path], object]) -> None:
        directory = save / f"iter_{step:07d}"
        directory.mkdir(parents=True)
        (directory / "weights").write_bytes(b"weights")
        (checksum,) = file_checksums([directory / "weights"], "--save")
        Manifest(step, step, {}, {}, {"weights": 7}, {"weights": checksum}).write(directory, text_checksum)
        (save / TRACKER).write_text(f"{step}\n")
        self.save, self.damage = save, damage

    def exit_code(self) -> int | None:
        return None

    def kill(self) -> None:
        self.damage(self.save)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda save: (save / TRACKER).unlink(), "checkpoint 5 of .* is lost; the newest is None"),
        (lambda save: (save / TRACKER).write_text("4\n"), "checkpoint 5 of .* is lost; the newest is 4"),
        (lambda save: (save / TRACKER).write_text(""), "must contain the number of the newest step"),
        (lambda save: shutil.rmtree(save / "iter_0000005"), "is not a complete checkpoint"),
        (lambda save: (save / "iter_0000005" / "weights").write_bytes(b"weight"), "has 6 bytes, not the original 7"),
        (lambda save: (save / "iter_0000005" / "weights").write_bytes(b"Weights"), "is damaged: weights"),
    ],
)
def test_a_lost_or_damaged_checkpoint_is_noticed(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    log = tmp_path / "log"
    log.touch()
    starts = kill_and_restart(lambda save, _: Ended(save, 5, damage), tmp_path, log, [Moment("start", 1, 0.0)], TIMING)
    with pytest.raises(ConfigError, match=message):
        next(starts)


def write_metrics(directory: Path, losses: list[float], held_out: float = 2.0) -> Path:
    directory.mkdir(exist_ok=True)
    names = ("loss_all", "loss_unselected", "share_selected", "threshold", "selection", "grad_norm", "lr")
    lines = [
        {"kind": "train", "step": step, "loss": loss, "seconds": loss, **dict.fromkeys(names, 1.0)}
        for step, loss in enumerate(losses, start=1)
    ]
    evaluation = {"kind": "eval", "step": len(losses), "set": "own", "loss": held_out, "tokens_evaluated": 5}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, evaluation]))
    return directory


def test_every_difference_of_the_losses_is_reported(tmp_path: Path) -> None:
    undisturbed = write_metrics(tmp_path / "a", [3.0, 2.0, 1.0])
    assert differences(write_metrics(tmp_path / "b", [3.0, 2.0, 1.0]), undisturbed, 3) == []
    (found,) = differences(write_metrics(tmp_path / "b", [3.0, 2.0000000000000004, 1.0]), undisturbed, 3)
    assert found == "step 2: train loss 2.0000000000000004 differs from 2.0"
    (found,) = differences(write_metrics(tmp_path / "b", [3.0, 2.0, 1.0], held_out=2.5), undisturbed, 3)
    assert found == "step 3: eval loss 2.5 differs from 2.0"
    assert any(
        "has the steps [1, 2]" in line for line in differences(write_metrics(tmp_path / "b", [3, 2]), undisturbed, 3)
    )
    metrics = write_metrics(tmp_path / "b", [3.0, 2.0, 1.0]) / METRICS_FILE
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["kind"] == "train"), encoding="utf-8")
    (found,) = differences(tmp_path / "b", undisturbed, 3)
    assert "has other evaluations than the undisturbed run" in found


def test_moments_are_seeded_and_ordered() -> None:
    moments = plan_kills(50, 100, 1)
    assert moments == plan_kills(50, 100, 1) != plan_kills(50, 100, 2)
    assert [moment.target for moment in moments] == sorted(moment.target for moment in moments)
    assert {moment.kind for moment in moments} == {"step", "save", "start"} and max(m.target for m in moments) <= 90


@pytest.mark.parametrize(
    ("test", "run", "message"),
    [
        ([], [], "there are no training arguments"),
        ([], ["--train-iters", "3"], "need --train-iters and --save-interval"),
        ([], ["--train-iters", "3", "--save-interval", "1", "--save", "x"], "Leave --save out"),
        (["--kills", "0"], ["--train-iters", "3", "--save-interval", "1"], "--kills and --nproc-per-node must be"),
        (["--fork", "--nproc-per-node", "2"], ["--train-iters", "3", "--save-interval", "1"], "--fork starts one rank"),
        (["--frok"], [], "unknown flag --frok. Did you mean --fork?"),
        ([], ["--train-iters", "3", "--save-interval", "1"], "is not empty"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], test: list[str], run: list[str], message: str
) -> None:
    directory = tmp_path / "runs"
    if message == "is not empty":
        (directory / "mine").mkdir(parents=True)
    assert main(["--directory", str(directory), *test, "--", *run]) == 2
    assert message in capsys.readouterr().err
    assert parse_arguments(["--directory", "d", "--", "--kills", "5"])[1] == ["--kills", "5"]


def test_a_failing_run_shows_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--directory", str(tmp_path / "runs"), "--fork", "--"]
    assert main([*argv, "--train-iters", "3", "--save-interval", "1"]) == 2
    errors = capsys.readouterr().err
    assert "the run exited with code 2" in errors and "missing required settings" in errors
