"""Test that a run with NaN losses ends with exit code 3 and an error location, without a checkpoint."""

from __future__ import annotations

from pathlib import Path

from megatron_slm.testing.tiny import command, launch_and_fail, make_corpus


def test_divergence_error_has_step_rank_and_position(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", 1)
    argv = command(corpus, tmp_path / "run", train_iters=20, optimizer="sgd", clip_grad=0)
    code, errors = launch_and_fail([*argv, "--lr", "1e6"])
    assert code == 3, errors
    assert "error: step " in errors and "rank 0" in errors and "--replay-step" in errors and "events.jsonl" in errors
    assert not list((tmp_path / "run").glob("iter_*"))
