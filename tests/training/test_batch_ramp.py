"""--rampup-batch-size: sizes and metrics of each step, schedules, scopes, and resumes within the ramp."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path

import pytest

from megatron_slm.testing.tiny import command, losses, make_corpus, records, run_each

SLM = ["--objective", "slm", "--slm-score", "token-loss", "--slm-scope", "global-batch", "--micro-batch-size", "2"]
RUNS = {
    "exact": ["--train-samples", "80", "--lr-warmup-samples", "20"],
    "predicted": ["--train-iters", "8", "--lr-warmup-iters", "4", "--slm-threshold", "predicted"],
}
SIZES = [4, 4, 4, 8, 12, 16, 16, 16]


@pytest.fixture(scope="module", params=["exact", pytest.param("predicted", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a command without interruption (in the directory ``full``), and with one within the ramp."""
    directory = tmp_path_factory.mktemp("ramp")
    corpus = make_corpus(directory / "corpus", 1)
    commands = []
    for save, more in (("full", []), ("run", ["--exit-interval", "4"]), ("run", ["--load", str(directory / "run")])):
        argv = command(corpus, directory / save, num_layers=1, eval_iters=0, rampup_batch_size=[4, 4, 30])
        commands.append([*argv, *SLM, *RUNS[request.param], *more])
    for outcome in run_each(*commands):
        assert outcome.code == 0, outcome.errors
    return directory / "run"


def test_resume_within_the_ramp_is_bit_for_bit(run: Path) -> None:
    assert len(losses(run)) == 8 and losses(run) == losses(run.parent / "full")


def test_metrics_count_the_samples_of_each_step(run: Path) -> None:
    found = records(run)
    assert [record["global_batch_size"] for record in found] == SIZES
    assert [record["tokens"] for record in found] == [32 * samples for samples in accumulate(SIZES)]
    for record, size in zip(found, SIZES, strict=True):
        assert record["tokens_per_second"] * record["seconds"] == pytest.approx(32 * size)


def test_schedules_follow_the_consumed_samples(run: Path) -> None:
    """The warm-up of 4 steps, or of their 20 samples, ends after the fourth step."""
    assert [record["lr"] for record in records(run)][:5] == pytest.approx([0.0, 2e-3, 4e-3, 6e-3, 1e-2])


def test_the_first_step_ranks_all_its_micro_batches(run: Path) -> None:
    assert records(run)[0]["share_selected"] * 4 * 32 == pytest.approx(math.ceil(0.6 * 4 * 32), abs=1e-6)
