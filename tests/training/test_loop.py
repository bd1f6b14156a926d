"""Test log intervals, retention, evaluation of finished checkpoints, and metrics on a full disk."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from statistics import fmean

import pytest

from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import (
    GLOBAL_BATCH,
    _main,
    command,
    launch_and_fail,
    launch_each,
    losses,
    make_corpus,
    records,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("loop") / "corpus", 1)


def test_interval_logs_the_mean_of_its_steps(tmp_path: Path, corpus: str) -> None:
    """Steps have equal weight although their token counts differ."""
    each, mean = tmp_path / "each", tmp_path / "mean"
    flags = {"train_iters": 6, "eval_iters": 20, "eod_mask_loss": True, "losses_only": True}
    launch_each([command(corpus, save, log_interval=n, **flags) for save, n in ((each, 1), (mean, 4))])
    steps, intervals = records(each), records(mean)
    assert [record["step"] for record in intervals] == [4, 6]
    for record, part in zip(intervals, (steps[:4], steps[4:]), strict=True):
        for name in ("loss", "loss_all", "share_selected"):
            assert record[name] == pytest.approx(fmean(step[name] for step in part), abs=1e-12)
        assert [record[name] for name in ("grad_norm", "lr", "tokens")] == [
            part[-1][name] for name in ("grad_norm", "lr", "tokens")
        ]
    assert steps[0]["seconds"] < 10 * fmean(step["seconds"] for step in steps[1:])  # no evaluation of 20 batches


def test_evaluation_does_not_change_training(tmp_path: Path, corpus: str) -> None:
    """Dropout is off during an evaluation, which draws no random number, and on again after it."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    flags = {"train_iters": 4, "eval_interval": 2, "losses_only": True, **dropout}
    with_evaluation, without = tmp_path / "with", tmp_path / "without"
    launch_each([command(corpus, save, eval_iters=n, **flags) for save, n in ((with_evaluation, 3), (without, 0))])
    assert losses(with_evaluation) == losses(without)
    evaluations = records(with_evaluation, "eval")
    assert [record["tokens_evaluated"] for record in evaluations] == [3 * GLOBAL_BATCH * 32] * 3


def test_finished_checkpoints_are_evaluated_and_superseded_ones_deleted(tmp_path: Path, corpus: str) -> None:
    save = tmp_path / "run"
    run = command(corpus, save, train_iters=5, load=save, save_interval=1, save_retain_interval=2, eval_iters=1)
    launch_each([run, run, [*run, "--skip-train"], [*run, "--skip-train", "--ckpt-step", "2"]])
    assert sorted(path.name for path in save.glob("*iter_*")) == ["iter_0000002", "iter_0000004", "iter_0000005"]
    assert len(records(save)) == 5
    evaluated = [(record["step"], record["loss"]) for record in records(save, "eval")]
    assert [step for step, _ in evaluated] == [0, 5, 5, 5, 2]
    assert len({loss for step, loss in evaluated if step == 5}) == 1 < len({loss for _, loss in evaluated})


def test_skip_train_needs_no_training_corpus(tmp_path: Path, corpus: str) -> None:
    save = tmp_path / "run"
    argv = command(corpus, save, load=save, skip_train=True, eval_iters=1, losses_only=True)
    place = argv.index("--data-path")
    without = argv[:place] + argv[place + 4 :]  # --split, too
    without += ["--objective", "slm", "--slm-corpus-ratios", "0.5", "web"]  # nor one for the selection
    launch_each([command(corpus, save, train_iters=1, eval_iters=1), without])
    first, last = (record["loss"] for record in records(save, "eval")[-2:])
    assert first == last
    code, errors = launch_and_fail(command(corpus, skip_train=True, eval_iters=1))
    assert code == 2 and "--skip-train evaluates a checkpoint: give it with --load" in errors
    code, errors = launch_and_fail(command(corpus, load=save, skip_train=True, eval_iters=0))
    assert code == 2 and "--skip-train has nothing to evaluate" in errors


def test_full_disk_does_not_end_training(tmp_path: Path, corpus: str) -> None:
    metrics, board = tmp_path / "metrics.jsonl", tmp_path / "board"
    argv = command(corpus, train_iters=3, slm_metrics_file=metrics, tensorboard_dir=board)
    ((code, errors),) = run_ranks(_on_a_full_disk, 1, argv, initialize=False)
    assert code == 0, errors
    assert errors.count("cannot be written (File too large)") == 2, errors
    assert "records were not written" in errors and "Traceback" not in errors
    assert metrics.read_text() == "" or metrics.read_text().endswith("}\n")


def _on_a_full_disk(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    return _main(rank, world_size, argv)
