"""Test the life cycle of a cluster job by events, on two gloo ranks.

After each event the run either continues with the losses of an undisturbed run, or stops with one message that names
the remedy. The tests of this module run in order and share one run.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, losses, make_corpus, records
from megatron_slm.training import loop

STEPS = 12
SMALL_DISK = 20_000  # file size limit in bytes: less than a checkpoint shard, more than a metrics file


@dataclass(frozen=True)
class Outcome:
    """Exit code of the ranks and output of rank 0."""

    code: int
    out: str
    error: str


@dataclass
class Job:
    """Represent a run that is requeued with the same command, and its uninterrupted baseline."""

    directory: Path
    corpus: str

    def run(
        self, name: str = "run", *, world_size: int = 2, event: tuple[str, int] | None = None, **flags: Any
    ) -> Outcome:
        """Run the job's command with changed ``flags`` and an event on one rank."""
        save = self.directory / name
        settings = {
            "load": save,
            "train_iters": STEPS,
            "num_layers": 1,
            "save_interval": 2,
            "exit_signal_handler": True,
            "objective": "slm",
            "slm_score": "token-loss",
            "use_distributed_optimizer": True,
            **flags,
        }
        argv = command(self.corpus, save, dp=2, **settings)
        outcomes = run_ranks(_rank, world_size, argv, event, initialize=False)
        assert len({code for code, _, _ in outcomes}) == 1, outcomes
        assert "Traceback" not in outcomes[0][2], outcomes[0][2]
        return Outcome(*outcomes[0])

    def losses(self, name: str = "run") -> list[tuple[Any, ...]]:
        return losses(self.directory / name)

    @property
    def step(self) -> int:
        """Return the newest saved step."""
        return int((self.directory / "run" / "latest_checkpointed_iteration.txt").read_text())


def _rank(rank: int, world_size: int, argv: list[str], event: tuple[str, int] | None) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    if event is not None and event[0] == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (event[1], event[1]))
    elif event is not None and rank == world_size - 1:
        _signal_after_step(*event)
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(out):
        code = main(argv)
    return code, out.getvalue(), error.getvalue()


def _signal_after_step(name: str, step: int) -> None:
    train_step, done = loop.train_step, iter(range(1, 1000))

    def step_then_signal(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        if next(done) == step:
            os.kill(os.getpid(), signal.Signals[name])
        return result

    loop.train_step = step_then_signal


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("job")
    return Job(directory, make_corpus(directory / "corpus", 1))


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> list[tuple[Any, ...]]:
    outcome = job.run("undisturbed")
    assert outcome.code == 0, outcome.error
    return job.losses("undisturbed")


def test_signal_saves_without_evaluation(job: Job, undisturbed: list[tuple[Any, ...]]) -> None:
    outcome = job.run(event=("SIGTERM", 3))
    assert outcome.code == 0, outcome.error
    assert job.step == 3
    assert [record["step"] for record in records(job.directory / "run", "eval")] == [0]
    assert job.losses() == undisturbed[:3]


def test_requeued_job_continues(job: Job, undisturbed: list[tuple[Any, ...]]) -> None:
    outcome = job.run(event=("SIGUSR1", 2))
    assert outcome.code == 0, outcome.error
    assert "resum" in outcome.out and "iter_0000003" in outcome.out
    assert job.step == 5
    assert job.losses() == undisturbed[:5]


def test_changed_corpus_is_detected(job: Job, undisturbed: list[tuple[Any, ...]]) -> None:
    kept = job.directory / "kept"
    kept.mkdir()
    files = [path for path in job.directory.glob("corpus*") if path.is_file()]
    for path in files:
        shutil.copy2(path, kept)
    make_corpus(job.directory / "corpus", 2)
    outcome = job.run()
    assert outcome.code == 2
    assert job.corpus in outcome.error
    for path in files:
        shutil.copy2(kept / path.name, path)
    assert job.step == 5 and job.losses() == undisturbed[:5]


def test_typo_in_load_is_refused(job: Job, undisturbed: list[tuple[Any, ...]]) -> None:
    outcome = job.run(load=job.directory / "rum")
    assert outcome.code == 2
    assert "--load" in outcome.error and "rum" in outcome.error
    assert job.losses() == undisturbed[:5]


def test_full_disk_keeps_the_newest_checkpoint(job: Job, undisturbed: list[tuple[Any, ...]]) -> None:
    outcome = job.run(event=("full disk", SMALL_DISK))
    assert outcome.code == 2
    assert "--save" in outcome.error and "could not be written" in outcome.error, outcome.error
    assert job.step == 5
    outcome = job.run(event=("SIGTERM", 3))
    assert outcome.code == 0, outcome.error
    assert job.step == 8 and job.losses() == undisturbed[:8]


def test_damaged_checkpoint_is_named_and_the_previous_one_loads(job: Job, undisturbed: list[tuple[Any, ...]]) -> None:
    newest = job.directory / "run" / "iter_0000008"
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    outcome = job.run(exit_interval=10)
    assert outcome.code == 0, outcome.error
    assert shard.name in outcome.out + outcome.error and "iter_0000006" in outcome.out + outcome.error
    assert job.step == 10 and job.losses() == undisturbed[:10]


def test_smaller_batch_continues_with_the_next_sample(job: Job) -> None:
    outcome = job.run(global_batch_size=8, exit_interval=11)
    assert outcome.code == 0, outcome.error
    assert "global" in outcome.out and "8" in outcome.out
    tokens = [record["tokens"] for record in records(job.directory / "run")]
    assert tokens[-1] - tokens[-2] == 8 * 32 and len(tokens) == 11


def test_longer_run_continues(job: Job) -> None:
    longer = {"global_batch_size": 8, "train_iters": STEPS + 6, "override_opt_param_scheduler": True}
    outcome = job.run(**longer, exit_interval=14)
    assert outcome.code == 0, outcome.error
    assert job.step == 14


def test_other_layout_continues(job: Job) -> None:
    """Two tensor-parallel ranks run the same four steps as two data-parallel ranks."""
    shutil.copytree(job.directory / "run", job.directory / "other")
    longer = {"global_batch_size": 8, "train_iters": STEPS + 6, "override_opt_param_scheduler": True}
    for name, layout in (("run", {}), ("other", {"tensor_model_parallel_size": 2})):
        outcome = job.run(name, **longer, **layout)
        assert outcome.code == 0, outcome.error
    got, expected = (records(job.directory / name) for name in ("other", "run"))
    assert [record["step"] for record in got] == list(range(1, STEPS + 7))
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in expected], rel=1e-3)


def test_finished_run_is_evaluated(job: Job) -> None:
    before = records(job.directory / "run", "eval")
    outcome = job.run(global_batch_size=8, train_iters=STEPS + 6, skip_train=True, override_opt_param_scheduler=True)
    assert outcome.code == 0, outcome.error
    assert f"held-out loss at step {STEPS + 6}" in outcome.out
    assert records(job.directory / "run", "eval")[-1]["loss"] == before[-1]["loss"]
