"""Test that runs resume exactly, truncated checkpoints are refused, and a failed save keeps the previous one."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import resource
from functools import partial
from pathlib import Path

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, launch_and_fail, launch_each, losses, make_corpus, records

two_layers = partial(command, num_layers=2, eval_iters=0)
losses_of = partial(two_layers, losses_only=True)
OPTIMIZERS = {"distributed": ["--use-distributed-optimizer"], "plain": []}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("resume") / "corpus", 1)


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "optimizer"),
    [
        (1, 1, 1, "distributed"),
        (1, 1, 1, "plain"),
        (1, 1, 2, "distributed"),
        (2, 1, 1, "plain"),
        (1, 2, 1, "distributed"),
    ],
)
def test_resume_is_bit_for_bit(tmp_path: Path, corpus: str, tp: int, pp: int, dp: int, optimizer: str) -> None:
    """The run has dropout, warm-up, a cosine schedule and random selection, which are all stateful."""
    flags = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--objective", "slm", "--slm-score", "random"]
    flags += ["--lr-decay-style", "cosine", "--lr-warmup-iters", "2", *OPTIMIZERS[optimizer]]
    flags += ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    world = tp * pp * dp
    flags += ["--eval-iters", "1"] if world == 1 else []
    launch(losses_of(corpus, tmp_path / "uninterrupted", dp=dp, train_iters=4) + flags, world)
    part = two_layers(corpus, tmp_path / "part", dp=dp, train_iters=4, load=tmp_path / "part") + flags
    launch([*part, "--exit-interval", "2"], world)
    assert len(losses(tmp_path / "part")) == 2
    launch([*part, "--exit-interval", "100"], world)
    assert losses(tmp_path / "part") == losses(tmp_path / "uninterrupted")
    part_evaluations, evaluations = (records(tmp_path / name, "eval") for name in ("part", "uninterrupted"))
    assert len(evaluations) == (2 if world == 1 else 0)
    assert [record["loss"] for record in part_evaluations[-1:]] == [record["loss"] for record in evaluations[-1:]]


def test_speculative_thresholds_resume_bit_for_bit(tmp_path: Path, corpus: str) -> None:
    """The speculative threshold of each rank determines the gradients in the forward pass, and their last bits."""
    flags = ["--objective", "slm", "--slm-score", "token-loss", "--slm-scope", "micro-batch"]
    flags += ["--slm-exact-mode", "speculative", "--use-distributed-optimizer"]
    launch(losses_of(corpus, tmp_path / "uninterrupted", dp=2, train_iters=4) + flags, 2)
    part = two_layers(corpus, tmp_path / "part", dp=2, train_iters=4, load=tmp_path / "part") + flags
    launch([*part, "--exit-interval", "2"], 2)
    launch([*part, "--exit-interval", "100"], 2)
    assert losses(tmp_path / "part") == losses(tmp_path / "uninterrupted")


def test_speculative_mode_may_start_on_resume(tmp_path: Path, corpus: str) -> None:
    """The checkpoint has no speculative threshold."""
    slm = two_layers(corpus, tmp_path / "run", load=tmp_path / "run", objective="slm", slm_score="token-loss")
    slm += ["--train-iters", "4"]
    launch_each([[*slm, "--exit-interval", "2"], [*slm, "--slm-exact-mode", "speculative"]])
    assert len(losses(tmp_path / "run")) == 4


def test_resume_in_another_layout(tmp_path: Path, corpus: str) -> None:
    """Saved on two pipeline stages, resumed on two tensor-parallel ranks."""
    first = two_layers(corpus, tmp_path / "part", train_iters=4, load=tmp_path / "part", use_distributed_optimizer=True)
    base = two_layers(corpus, tmp_path / "base", train_iters=1)
    start = ["--pretrained-checkpoint", str(tmp_path / "base")]
    launch_each([base, [*losses_of(corpus, tmp_path / "uninterrupted", train_iters=4), *start]])
    launch([*first, *start, "--pipeline-model-parallel-size", "2", "--exit-interval", "2"], 2)
    launch([*first, *start, "--tensor-model-parallel-size", "2"], 2)
    got, expected = records(tmp_path / "part"), records(tmp_path / "uninterrupted")
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in expected], rel=2e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "run"
    launch(two_layers(corpus, directory, train_iters=1))
    return directory


def test_truncated_checkpoint_is_refused(tmp_path: Path, corpus: str, saved: Path) -> None:
    victim = max((saved / "iter_0000001").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(content[:-100])
    try:
        code, errors = launch_and_fail(two_layers(corpus, tmp_path / "new", train_iters=2, load=saved))
    finally:
        victim.write_bytes(content)
    assert code == 2
    assert victim.name in errors and "damaged" in errors and str(len(content)) in errors


def test_checkpoint_of_another_size_is_refused(tmp_path: Path, corpus: str, saved: Path) -> None:
    argv = two_layers(corpus, tmp_path / "new", train_iters=2, load=saved, finetune=True, hidden_size=64)
    code, errors = launch_and_fail(argv)
    assert code == 2
    assert "--load: --hidden-size 64 differs from the model" in errors and "Give --hidden-size 32" in errors


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, corpus: str) -> None:
    save = tmp_path / "run"
    launch(two_layers(corpus, save, train_iters=2, exit_interval=1))
    [(code, errors)] = run_ranks(
        _main_with_small_files, 1, two_layers(corpus, save, train_iters=2, load=save), initialize=False
    )
    assert code == 2 and "--save" in errors and "File too large" in errors, errors
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    assert not (save / "iter_0000002").exists()
    launch(two_layers(corpus, save, train_iters=2, load=save))
    assert [record["step"] for record in records(save)] == [1, 2]


def _main_with_small_files(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    return code, errors.getvalue()


def test_saving_leaves_no_process_behind(tmp_path: Path, corpus: str) -> None:
    assert run_ranks(_train_and_count, 1, two_layers(corpus, tmp_path / "run", train_iters=1), initialize=False) == [0]
    assert (tmp_path / "run" / "iter_0000001").is_dir()


def _train_and_count(rank: int, world_size: int, argv: list[str]) -> int:
    """Return the child processes that are alive after the run."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(argv) == 0
    return len(multiprocessing.active_children())
