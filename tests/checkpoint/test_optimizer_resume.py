"""Test that a run resumes with any optimizer, the configured settings, and the schedule at the saved step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_slm.checkpoint.optimizer_state import OPTIMIZER_FORMAT, _saved_as
from megatron_slm.testing.tiny import command, losses, make_corpus, records, run_each

KINDS: dict[str, list[str]] = {
    "plain": [],
    "distributed": ["--use-distributed-optimizer"],
    "bf16": ["--bf16"],
    "bf16-distributed": ["--bf16", "--use-distributed-optimizer"],
    "sgd": ["--optimizer", "sgd"],
    "sgd-without-momentum": ["--optimizer", "sgd", "--sgd-momentum", "0"],
}
PAIRS = [
    *(("plain", "distributed"), ("distributed", "plain"), ("bf16", "bf16-distributed"), ("bf16-distributed", "bf16")),
    *(("plain", "bf16-distributed"), ("distributed", "bf16"), ("bf16", "distributed"), ("bf16-distributed", "plain")),
    *(("sgd", "sgd"), ("sgd-without-momentum", "sgd-without-momentum")),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("optimizers") / "corpus", 1)


SCHEDULE = ["--lr-warmup-iters", "1", "--lr-decay-style", "cosine", "--eval-iters", "0", "--num-layers", "1"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """For each optimizer, train an uninterrupted run of four steps, and a run that stops after two."""
    directory = tmp_path_factory.mktemp("saved")
    commands = []
    for name, flags in KINDS.items():
        commands.append(
            command(corpus, directory / f"{name}-uninterrupted", train_iters=4, losses_only=True) + SCHEDULE + flags
        )
        commands.append(command(corpus, directory / name, train_iters=4, exit_interval=2) + SCHEDULE + flags)
    for outcome in run_each(*commands):
        assert outcome.code == 0, outcome.errors
    return directory


def resume(
    corpus: str, saved: Path, name: str, save: Path, *flags: str, train_iters: int = 4, **more: Any
) -> list[str]:
    argv = command(corpus, save, load=saved / name, losses_only=True, train_iters=train_iters, **more)
    return [*argv, *SCHEDULE, *flags]


def test_every_optimizer_resumes_with_the_state_of_another(tmp_path: Path, corpus: str, saved: Path) -> None:
    commands = [resume(corpus, saved, one, tmp_path / f"{one}-{other}", *KINDS[other]) for one, other in PAIRS]
    for (one, other), outcome in zip(PAIRS, run_each(*commands), strict=True):
        assert outcome.code == 0, (one, other, outcome.errors)
        uninterrupted = saved / f"{one}-uninterrupted"
        if one == other:
            assert losses(tmp_path / f"{one}-{other}") == losses(uninterrupted)[2:]
            continue
        rel = 1e-5 if ("bf16" in one) == ("bf16" in other) else 5e-3  # bf16 rounds weights and activations
        expected = _progress(uninterrupted)[4:]
        assert _progress(tmp_path / f"{one}-{other}") == pytest.approx(expected, rel=rel), (one, other)


def _progress(save: Path) -> list[float]:
    return [record[name] for record in records(save) for name in ("loss", "lr")]


def test_other_optimizer_type_is_refused_or_starts_fresh(tmp_path: Path, corpus: str, saved: Path) -> None:
    refused, started = run_each(
        resume(corpus, saved, "distributed", tmp_path / "refused", *KINDS["sgd"]),
        resume(corpus, saved, "distributed", tmp_path / "started", *KINDS["sgd"], "--no-load-optim"),
    )
    assert refused.code == 2
    assert "--optimizer sgd differs" in refused.errors and "--no-load-optim" in refused.errors
    assert started.code == 0, started.errors
    assert "--optimizer adam -> sgd" in started.output


def test_optimizer_flags_apply_on_resume(tmp_path: Path, corpus: str, saved: Path) -> None:
    """Each flag changes the second step, which it would not with the checkpoint's parameter groups."""
    override = ["--lr", "2e-2", "--min-lr", "1e-3", "--weight-decay", "0.3", "--override-opt_param-scheduler"]
    cases = {
        "plain": [[], ["--adam-beta1", "0.5"], ["--adam-eps", "1e-2"], override],
        "distributed": [[], ["--adam-beta2", "0.5"], override],
    }
    commands = [
        resume(corpus, saved, kind, tmp_path / f"{kind}-{number}", *KINDS[kind], *flags)
        for kind, each in cases.items()
        for number, flags in enumerate(each)
    ]
    outcomes = run_each(*commands)
    assert [outcome.code for outcome in outcomes] == [0] * len(commands), outcomes
    for kind, each in cases.items():
        last = [records(tmp_path / f"{kind}-{number}")[-1] for number in range(len(each))]
        assert len({record["loss"] for record in last}) == len(each)
        assert last[-1]["lr"] > 1.5 * last[0]["lr"]
    assert "--adam-beta1 0.9 -> 0.5" in outcomes[1].output


def test_changed_schedule_is_refused_without_a_scheduler_flag(tmp_path: Path, corpus: str, saved: Path) -> None:
    longer = {"train_iters": 8, "lr": "2e-2"}
    use = "--use-checkpoint-opt_param-scheduler"
    refused, override, checkpoint, without = run_each(
        resume(corpus, saved, "plain", tmp_path / "refused", **longer),
        resume(corpus, saved, "plain", tmp_path / "override", "--override-opt_param-scheduler", **longer),
        resume(corpus, saved, "plain", tmp_path / "checkpoint", use, **longer),
        resume(corpus, saved, "plain", tmp_path / "without", "--no-load-optim"),
    )
    assert refused.code == 2 and use in refused.errors and "lr_decay_steps (in samples) 128" in refused.errors
    assert override.code == checkpoint.code == without.code == 0, (override, checkpoint, without)
    expected = [record["lr"] for record in records(saved / "plain-uninterrupted")]
    rates = {name: [r["lr"] for r in records(tmp_path / name)] for name in ("override", "checkpoint", "without")}
    assert rates["checkpoint"][:2] == expected[2:]
    assert rates["checkpoint"][2:] == pytest.approx([0.0] * 4, abs=1e-9)
    assert rates["without"] == expected[2:]  # no new warm-up
    assert rates["override"][0] > 1.5 * expected[2] and len(rates["override"]) == 6
    assert "--lr 0.02 ignored, 0.01 kept" in checkpoint.output


def test_resume_without_random_or_optimizer_states(tmp_path: Path, corpus: str) -> None:
    """The states are not saved, or saved and not loaded."""
    dropout = {"hidden_dropout": 0.3, "train_iters": 4}
    uninterrupted = [*command(corpus, tmp_path / "uninterrupted", losses_only=True, **dropout), *SCHEDULE]
    first = [*command(corpus, tmp_path / "run", **dropout, exit_interval=2), *SCHEDULE]
    bare = [*command(corpus, tmp_path / "bare", **dropout, exit_interval=2), *SCHEDULE, "--no-save-rng"]

    def again(name: str, save: str, *flags: str) -> list[str]:
        argv = command(corpus, tmp_path / save, load=tmp_path / name, losses_only=True, **dropout)
        return [*argv, *SCHEDULE, *flags]

    outcomes = run_each(
        uninterrupted,
        first,
        [*bare, "--no-save-optim"],
        again("run", "same"),
        again("run", "rng", "--no-load-rng"),
        again("bare", "refused"),
        again("bare", "started", "--no-load-optim"),
        again("run", "tuned", "--finetune", "--no-load-optim", "--lr", "2e-2", "--optimizer", "sgd"),
        again("run", "both", "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"),
        again("run", "kept", "--use-checkpoint-opt_param-scheduler", "--no-load-optim", "--lr", "2e-2"),
    )
    codes = dict(zip(("same", "rng", "refused", "started", "tuned", "both", "kept"), outcomes[3:], strict=True))
    assert {name: outcome.code for name, outcome in codes.items()} == {
        **dict.fromkeys(("same", "rng", "started", "tuned", "kept"), 0),
        **dict.fromkeys(("refused", "both"), 2),
    }, outcomes
    assert losses(tmp_path / "same") == losses(tmp_path / "uninterrupted")[2:]
    assert losses(tmp_path / "rng") != losses(tmp_path / "uninterrupted")[2:], "other dropout"
    assert "has no optimizer state" in codes["refused"].errors and "--no-load-optim" in codes["refused"].errors
    assert [record["step"] for record in records(tmp_path / "started")] == [3, 4]
    assert [record["step"] for record in records(tmp_path / "tuned")] == [1, 2, 3, 4]
    assert "--lr 0.01 -> 0.02" in codes["kept"].output and "ignored" not in codes["kept"].output


def test_names_do_not_depend_on_expert_parallelism() -> None:
    """Names had a prefix only with expert parallelism, so that optimizer state was tied to it; both are read."""
    assert OPTIMIZER_FORMAT["chained_optim_avoid_prefix"]
    request = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.experts.weight", torch.zeros(2))
    for prefix in ("", "chained_1."):
        key = f"{prefix}optimizer.state.exp_avg.experts.weight"
        found = _saved_as({("exp_avg", "experts.weight"): key})(request)
        assert found is not None and found.key == key
