"""Test events of a run: NaN gradients and spikes, their records, and their effect on the weights."""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import megatron_slm.training.step as step_module
from megatron_slm.cli.pretrain import main
from megatron_slm.config.paths import EVENTS_FILE
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, losses, make_corpus, records
from megatron_slm.training.loop import TrainState
from megatron_slm.training.step import Step
from megatron_slm.training.step_report import DivergedToken, SampleLosses

WINDOW = {"slm_spike_window": 4, "slm_spike_threshold": 20, "lr": 1e-3, "eval_iters": 0}
Fault = tuple[int, int, float]  # rank, step from 1, factor of the differentiated sum


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("events") / "corpus", 1)


def _train(argv: list[str], rank: int, fault: Fault | None) -> tuple[int, str]:
    """Run the trainer; the fault scales the gradients of one step, and not the token losses."""
    selective_loss, train_step, steps = step_module.selective_loss, step_module.train_step, []

    def counted(state: TrainState, *args: Any, **kwargs: Any) -> Step:
        steps.append(state.progress.step + 1)
        return train_step(state, *args, **kwargs)

    def scaled(*args: Any) -> Any:
        loss = selective_loss(*args)
        is_here = fault is not None and (rank, steps[-1:]) == (fault[0], [fault[1]])
        return replace(loss, numerator=loss.numerator * fault[2]) if is_here else loss

    errors = io.StringIO()
    with (
        mock.patch.object(step_module, "selective_loss", scaled),
        mock.patch("megatron_slm.training.loop.train_step", counted),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        code = main(argv)
    return code, errors.getvalue()


def _ranks(rank: int, world_size: int, argv: list[str], fault: Fault) -> tuple[int, str]:
    return _train(argv, rank, fault)


def _each(rank: int, world_size: int, runs: list[tuple[list[str], Fault | None]]) -> list[tuple[int, str]]:
    return [_train(argv, rank, fault) for argv, fault in runs]


def events(save: Path) -> list[dict[str, Any]]:
    path = save / EVENTS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("layout", [{"dp": 2, "use_distributed_optimizer": True}, {"pipeline_model_parallel_size": 2}])
def test_nan_gradients_with_finite_losses_end_the_run_before_the_update(
    tmp_path: Path, corpus: str, layout: dict[str, Any]
) -> None:
    argv = command(corpus, tmp_path / "run", train_iters=4, clip_grad=0, eval_iters=0, **layout)
    outcomes = run_ranks(_ranks, 2, argv, (1, 3, math.nan), initialize=False)
    assert [code for code, _ in outcomes] == [3, 3]
    assert "step 3: the gradient norm is nan and all losses are finite" in outcomes[0][1] and not outcomes[1][1]
    (event,) = events(tmp_path / "run")
    assert (event["event"], event["step"], event["grad_norm"], event["diverged"]) == ("nan_gradient", 3, "nan", 0)
    assert event["parameters"] and all(rank in (0, 1) for rank in event["ranks"])
    assert sorted(sample["sample"] for sample in event["samples"]) == list(range(32, 48))
    assert {sample["rank"] for sample in event["samples"]} == ({0, 1} if "dp" in layout else {1})
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]


def test_spikes_are_recorded_skipped_or_end_the_run(tmp_path: Path, corpus: str) -> None:
    """A factor of 1000 is a spike in step 6 and none in step 2, before there is an estimate."""
    saves = [tmp_path / name for name in ("none", "early", "log", "skip", "stop", "off")]
    none, early, log, skip, stop, off = saves
    runs = [
        (command(corpus, none, train_iters=8, **WINDOW), None),
        (command(corpus, early, train_iters=3, slm_spike_action="stop", **WINDOW), (0, 2, 1000.0)),
        (command(corpus, log, train_iters=8, **WINDOW), (0, 6, 1000.0)),
        (command(corpus, skip, train_iters=8, slm_spike_action="skip", **WINDOW), (0, 6, 1000.0)),
        (command(corpus, stop, train_iters=8, slm_spike_action="stop", **WINDOW), (0, 6, 1000.0)),
        (command(corpus, off, train_iters=8, no_check_for_large_grads=True, **WINDOW), (0, 6, 1000.0)),
    ]
    outcomes = run_ranks(_each, 1, runs, initialize=False)[0]
    assert [code for code, _ in outcomes] == [0, 0, 0, 0, 3, 0], outcomes
    assert [len(events(save)) for save in saves] == [0, 0, 1, 1, 1, 0]
    for save, (_, errors) in zip((log, skip, stop), outcomes[2:5], strict=True):
        (event,) = events(save)
        (spike,) = event["spikes"]
        assert (event["event"], event["step"], event["action"]) == ("spike", 6, save.name)
        assert spike["metric"] == "grad_norm" and spike["value"] == event["grad_norm"] > spike["limit"]
        assert sorted(sample["sample"] for sample in event["samples"]) == list(range(80, 96))
        assert event["loss"] == records(none)[5]["loss"]
        assert "step 6: the gradient norm" in errors and str(save / EVENTS_FILE) in errors
    assert losses(log) == losses(off) and losses(log)[6:] != losses(none)[6:]
    assert losses(skip)[:5] == losses(none)[:5] and losses(skip)[6:] != losses(log)[6:]
    assert [record["lr"] for record in records(skip)] == [record["lr"] for record in records(none)]
    assert [record["step"] for record in records(stop)] == [1, 2, 3, 4, 5] and not list(stop.glob("iter_*"))


def test_the_estimate_survives_a_resume(tmp_path: Path, corpus: str) -> None:
    argv = command(corpus, tmp_path / "run", train_iters=6, exit_interval=5, load=tmp_path / "run", **WINDOW)
    outcomes = run_ranks(_each, 1, [(argv, None), (argv, (0, 6, 1000.0))], initialize=False)[0]
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["spikes"][0]["steps"]) == (6, 4)


def test_the_estimate_begins_again_with_another_selection(tmp_path: Path, corpus: str) -> None:
    """Otherwise, the higher loss of the selected tokens is a spike, which ends every resume of the run."""
    flags: dict[str, Any] = {**WINDOW, "slm_spike_threshold": 6, "lr": 1e-6, "train_iters": 8, "lr_decay_iters": 8}
    argv = command(corpus, tmp_path / "run", **flags, check_for_spiky_loss=True, slm_spike_action="stop")
    selection = ["--objective", "slm", "--slm-score", "token-loss", "--slm-selection-ratio", "0.1"]
    runs = [([*argv, "--exit-interval", "4"], None), ([*argv, "--load", str(tmp_path / "run"), *selection], None)]
    assert [code for code, _ in run_ranks(_each, 1, runs, initialize=False)[0]] == [0, 0]
    before, after = (records(tmp_path / "run")[step] for step in (3, 4))
    assert after["loss"] > before["loss"] + 0.1


def test_skipped_iterations_consume_their_samples(tmp_path: Path, corpus: str) -> None:
    """After a NaN in step 3, the run continues without this step; the schedule and all other samples are the same."""
    save, plain = tmp_path / "run", tmp_path / "plain"
    argv = command(corpus, save, train_iters=5, save_interval=2, load=save, lr=1e-3, eval_iters=0)
    runs = [
        (argv, (0, 3, math.nan)),
        ([*argv, "--iterations-to-skip", "3", "9"], (0, 3, math.nan)),
        (command(corpus, plain, train_iters=5, lr=1e-3, eval_iters=0), None),
        ([*argv, "--iterations-to-skip", "3", "--replay-step", "3"], None),
        ([*argv, "--iterations-to-skip", "three"], None),
    ]
    outcomes = run_ranks(_each, 1, runs, initialize=False)[0]
    assert [code for code, _ in outcomes] == [3, 0, 0, 2, 2], outcomes
    assert "is in --iterations-to-skip" in outcomes[3][1] and "must be an integer" in outcomes[4][1]
    skipped, whole = records(save), records(plain)
    assert [record["step"] for record in skipped] == [1, 2, 4, 5]
    of_plain = [whole[record["step"] - 1] for record in skipped]
    assert [record["lr"] for record in skipped] == [record["lr"] for record in of_plain]
    assert [record["loss"] for record in skipped][:2] == [record["loss"] for record in of_plain][:2]
    assert skipped[2]["loss"] != of_plain[2]["loss"] == pytest.approx(skipped[2]["loss"], abs=0.2)


def test_first_nan_of_a_sample_in_several_slices_is_the_one_with_the_lowest_position() -> None:
    """With context parallelism, a rank has one slice of the first half of a sample and one of the second half."""
    slices = [
        SampleLosses(5, rank, 0, 0, 16, 16, 1.0, 1.0, 1, DivergedToken(position, math.nan, None))
        for rank, position in ((0, 30), (1, 12))
    ]
    for one, other in (slices, reversed(slices)):
        total = one + other
        assert (total.rank, total.diverged, total.first_diverged) == (1, 2, slices[1].first_diverged)
