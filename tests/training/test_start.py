"""Test the start of a run, determined by flags and directory contents, without data loss or silent decisions."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.config.flags import parse
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.launch import SlurmJob
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import _main, command, launch, launch_and_fail, make_corpus, records
from megatron_slm.training.preflight import resolve_values
from megatron_slm.training.save_directory import Origin, RunRecord, read_record, write_record
from megatron_slm.training.start import Start, plan_start, prepare_save

TRACKER = "latest_checkpointed_iteration.txt"


def save_steps(directory: Path, *steps: int, record: RunRecord | None = None, tracker: bool = True) -> Path:
    """Write a --save directory as after a run that saved ``steps``."""
    directory.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (directory / f"iter_{step:07d}").mkdir()
        (directory / f"iter_{step:07d}" / "manifest.json").write_text("{}")
    if tracker and steps:
        (directory / TRACKER).write_text(f"{steps[-1]}\n")
    if record is not None:
        write_record(directory, record, RunConfig())
    return directory


def plan(**flags: Any) -> Start:
    return plan_start(config_of(**flags))


def config_of(**flags: Any) -> RunConfig:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return with_settings(RunConfig(), given)


def directory_of(start: Start) -> Path | None:
    return None if start.checkpoint is None else start.checkpoint.directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_steps(tmp_path / "base", 5, 10)


def from_base(base: Path, weights_only: bool = True, flag: str = "--load") -> RunRecord:
    return RunRecord.new(Origin(flag, str(base.resolve()), None, weights_only))


def test_first_start_with_equal_load_and_save_is_new(tmp_path: Path) -> None:
    start = plan(load=tmp_path / "run", save=f"{tmp_path}/other/../run/")
    assert start.checkpoint is None and "new run" in start.describe("run") and "no checkpoint yet" in start.note
    (tmp_path / "run" / "iter_0000005.partial").mkdir(parents=True)  # killed in its first save
    assert plan(load=tmp_path / "run", save=tmp_path / "run").checkpoint is None


@pytest.mark.parametrize("step", [None, 5])
def test_run_resumes_itself(tmp_path: Path, base: Path, step: int | None) -> None:
    (tmp_path / "link").symlink_to(base)
    for path in (base, tmp_path / "link"):
        start = plan(load=path, save=base, ckpt_step=step)
        assert (directory_of(start) or Path()).resolve() == base / f"iter_{step or 10:07d}" and not start.weights_only
        assert "resuming from" in start.describe(str(base))
    assert directory_of(plan(load=base / "iter_0000005", save=base)) == base / "iter_0000005"


def test_missing_tracker_file_is_reported(tmp_path: Path, base: Path) -> None:
    """The newest step with a manifest is complete, since manifests are written last."""
    (base / TRACKER).unlink()
    (base / "iter_0000015").mkdir()
    for flags in ({"load": base, "save": base}, {"load": base}, {"load": base, "save": tmp_path / "new"}):
        start = plan(**flags)
        assert directory_of(start) == base / "iter_0000010" and f"{TRACKER} is missing" in start.describe(None)
    assert directory_of(plan(load=base, ckpt_step=5)) == base / "iter_0000005"


def test_weights_start_a_run_and_its_requeue_resumes_it(tmp_path: Path, base: Path) -> None:
    for flags in ({"load": base, "finetune": True}, {"pretrained_checkpoint": base}):
        save = tmp_path / next(iter(flags))
        start = plan(**flags, save=save)
        assert directory_of(start) == base / "iter_0000010" and start.weights_only
        assert start.record is not None and "from the weights of" in start.describe("run")
        save_steps(save, record=start.record)
        assert plan(**flags, save=save).weights_only, "killed before its first checkpoint"
        save_steps(save, 3)
        again = plan(**flags, save=save)
        assert directory_of(again) == save / "iter_0000003" and not again.weights_only
        assert again.record == start.record and f"started from {base}" in again.describe(str(save))


def test_requeue_loads_its_optimizer_state_with_no_load_optim(tmp_path: Path, base: Path) -> None:
    config = config_of(load=base, save=tmp_path / "run", finetune=True, load_optim=False, load_rng=False)
    start = plan_start(config)
    assert not start.adjusted(config).checkpoint.load_optim
    save_steps(tmp_path / "run", 3, record=start.record)
    adjusted = plan_start(config).adjusted(config).checkpoint
    assert adjusted.load_optim and adjusted.load_rng
    config = with_settings(config, {"load": config.checkpoint.save, "finetune": False})
    assert not plan_start(config).adjusted(config).checkpoint.load_optim, "here the flag concerns the run itself"


def test_a_named_pipe_is_no_record_of_a_run(tmp_path: Path) -> None:
    """Reading it would wait for a writer."""
    os.mkfifo(tmp_path / "slm_run.json")
    assert read_record(tmp_path) is None
    os.mkfifo(tmp_path / TRACKER)
    with pytest.raises(ConfigError, match=f"{TRACKER} cannot be read .not a regular file"):
        plan(load=tmp_path, save=tmp_path)


def test_continuation_in_another_directory_resumes_itself(tmp_path: Path, base: Path) -> None:
    start = plan(load=base, save=tmp_path / "run")
    assert directory_of(start) == base / "iter_0000010" and not start.weights_only
    save_steps(tmp_path / "run", 12, record=start.record)
    assert directory_of(plan(load=base, save=tmp_path / "run")) == tmp_path / "run" / "iter_0000012"


def test_pretrained_weights_are_used_until_the_run_has_a_checkpoint(tmp_path: Path, base: Path) -> None:
    flags = {"load": tmp_path / "run", "save": tmp_path / "run", "pretrained_checkpoint": base}
    start = plan(**flags)
    assert directory_of(start) == base / "iter_0000010" and start.weights_only
    save_steps(tmp_path / "run", 2, record=start.record)
    assert directory_of(plan(**flags)) == tmp_path / "run" / "iter_0000002"


def test_requeued_job_without_load_resumes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    start = plan(save=tmp_path / "run")
    save_steps(tmp_path / "run", 2, record=start.record)
    with pytest.raises(ConfigError, match="contains another run"):
        plan(save=tmp_path / "run")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for overwrite in (False, True):
        again = plan(save=tmp_path / "run", slm_overwrite_save=overwrite)
        assert directory_of(again) == tmp_path / "run" / "iter_0000002" and not again.overwrites
    assert again.record is not None and again.record.job == SlurmJob("77", 1)


def test_evaluation_ignores_an_unrelated_save(tmp_path: Path, base: Path) -> None:
    """With --skip-train, an unrelated --save is unchanged; a run in --save that started from --load is evaluated."""
    save_steps(tmp_path / "other", 3)
    tuned = save_steps(tmp_path / "tuned", 4, record=from_base(base))
    for name, flags, step in (
        ("other", {"load": base}, base / "iter_0000010"),
        ("other", {"load": base, "finetune": True}, base / "iter_0000010"),
        ("other", {"load": base, "slm_overwrite_save": True}, base / "iter_0000010"),
        ("other", {"pretrained_checkpoint": base}, base / "iter_0000010"),
        ("base", {"load": base, "finetune": True}, base / "iter_0000010"),
        ("base", {"load": base, "ckpt_step": 5}, base / "iter_0000005"),
        ("new", {"load": base}, base / "iter_0000010"),
        ("tuned", {"load": base, "finetune": True}, tuned / "iter_0000004"),
        ("tuned", {"load": base}, base / "iter_0000010"),
    ):
        start = plan(**flags, save=tmp_path / name, skip_train=True)
        assert directory_of(start) == step, (name, flags)
        assert start.describe(str(tmp_path / name)).startswith(f"evaluating {step}, without training or saving")
    assert not (tmp_path / "new").exists()


REFUSED = [
    ({"load": "typo"}, "--load .*typo: there is no such directory"),
    ({"load": "typo", "save": "run"}, "--load .*typo: there is no such directory.*add --save"),
    ({"load": "typo", "save": "run", "finetune": True}, "--load .*typo: there is no such directory"),
    ({"load": "typo", "save": "run", "pretrained_checkpoint": "base"}, "--load .*typo: there is no such directory"),
    ({"pretrained_checkpoint": "typo"}, "--pretrained-checkpoint .*typo: there is no such directory"),
    ({"load": "file"}, "--load .*file is a file"),
    ({"load": ".", "save": "run"}, "not a checkpoint .neither latest_checkpointed"),
    ({"load": "base", "ckpt_step": 7}, "step 7 .--ckpt-step. does not exist. Existing steps: 5, 10"),
    ({"load": "new", "save": "new", "ckpt_step": 7}, "--load .*new: there is no such directory"),
    ({"load": "gone"}, "step 10 .from .*latest_checkpointed.* does not exist. Existing steps: none"),
    ({"load": "megatron"}, "latest_checkpointed_iteration.txt is missing, and no iter_. directory has a manifest"),
    ({"load": "base/iter_0000007", "save": "base"}, "iter_0000007: not a complete checkpoint"),
    ({"load": "megatron/iter_0000010", "save": "megatron"}, "iter_0000010: not a complete checkpoint"),
    ({"load": "new/iter_0000007", "save": "new"}, "iter_0000007: not a complete checkpoint"),
    ({"load": "new", "save": "new", "exit_on_missing_checkpoint": True}, "there is no checkpoint"),
    ({"load": "base", "save": "base", "finetune": True}, "would replace its base"),
    ({"save": "base"}, "--save .*base contains another run. To resume it, use --load .*base without --finetune"),
    ({"save": "tuned"}, "contains another run, started from .*base"),
    ({"save": "tuned", "load": "other"}, "contains another run, started from .*base"),
    ({"save": "tuned", "load": "base"}, "contains another run, started from .*base"),
    ({"save": "tuned", "load": "other", "finetune": True}, "contains another run, started from .*base"),
    ({"save": "tuned", "load": "base", "finetune": True, "ckpt_step": 5}, "contains another run, started from .*base"),
    ({"save": "lost"}, "contains another run"),
    ({"load": "new", "save": "new", "skip_train": True}, "--skip-train evaluates a checkpoint"),
    ({"slm_overwrite_save": True}, "--slm-overwrite-save needs --save"),
    ({"save": "base", "load": "base", "slm_overwrite_save": True}, "would remove .*base, which --load reads"),
    ({"save": "base", "reference_load": "base/iter_0000005", "slm_overwrite_save": True}, "which --reference-load"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=str)
def test_start_is_refused(tmp_path: Path, base: Path, flags: dict[str, Any], message: str) -> None:
    (tmp_path / "file").touch()
    save_steps(tmp_path / "other", 10)
    save_steps(tmp_path / "tuned", 3, record=from_base(base))
    save_steps(tmp_path / "lost", 3, tracker=False)
    save_steps(tmp_path / "gone")
    (tmp_path / "gone" / TRACKER).write_text("10")
    (tmp_path / "megatron" / "iter_0000010").mkdir(parents=True)
    paths = {name: tmp_path / value if isinstance(value, str) else value for name, value in flags.items()}
    if "reference_load" in paths:
        paths["reference_load"] = [str(paths["reference_load"])]
    with pytest.raises(ConfigError, match=message):
        plan(**paths)


def test_overwriting_removes_only_the_run(tmp_path: Path) -> None:
    run = save_steps(tmp_path / "run", 5, 10, record=RunRecord.new(None))
    (run / "iter_0000015.partial").mkdir()
    for name in ("metrics.jsonl", "notes.txt", "iter_notes"):
        (run / name).write_text("text")
    config = config_of(save=run, slm_overwrite_save=True)
    start = plan_start(config)
    assert start.checkpoint is None and start.overwrites and "is removed" in start.describe(str(run))
    assert len(list(run.iterdir())) == 8, "planning changes nothing"
    prepare_save(config, start)
    assert sorted(path.name for path in run.iterdir()) == ["iter_notes", "notes.txt", "slm_run.json"]
    assert read_record(run) == start.record


def test_record_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "slm_run.json").write_text('{"theirs": 1}')
    config = config_of(save=tmp_path)
    with pytest.raises(ConfigError, match=r"slm_run.json exists and was not written by megatron_slm"):
        prepare_save(config, plan_start(config))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("start") / "corpus", 1)


@pytest.mark.parametrize("exists", [False, True])
def test_refused_start_leaves_no_files_in_save(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    """W&B refuses the run after the run's record and the metrics file are written."""
    wandb = ModuleType("wandb")

    def refuse(**_: Any) -> None:
        raise OSError("no login")

    wandb.init = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    save = tmp_path / "runs" / "new"
    if exists:
        save.mkdir(parents=True)
        (save / "notes.txt").touch()
    assert main(command(corpus, save, train_iters=1, wandb_project="p")) == 2
    assert [path.name for path in tmp_path.rglob("*")] == (["runs", "new", "notes.txt"] if exists else [])


@pytest.mark.parametrize("given", ["--save", "--slm-metrics-file"])
@pytest.mark.parametrize("kind", ["directory", "foreign"])
def test_invalid_metrics_file_is_refused_before_torch_is_loaded(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str], given: str, kind: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if kind == "directory" else path.write_text("their text\n")
    argv = [*command(corpus, train_iters=1), given, str(tmp_path if given == "--save" else path)]
    with pytest.raises(ConfigError, match=r"--slm-metrics-file:? .*metrics\.jsonl"):
        resolve_values(parse(argv).config, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_output_directories_are_checked_on_the_first_rank(tmp_path: Path, corpus: str) -> None:
    """A directory missing on one host is reported without leaving other ranks waiting."""
    (tmp_path / "file").touch()
    argv = command(corpus, tmp_path / "file" / "run", dp=2, train_iters=1)
    resolve_values(parse(argv).config, 2)
    (code, errors), (other, silent) = run_ranks(_main, 2, argv, initialize=False)
    assert code == other == 2 and "file is a file, not a directory" in errors and not silent, (errors, silent)


def test_requeued_run_equals_an_uninterrupted_run(tmp_path: Path, corpus: str) -> None:
    """Two ranks start from base weights, stop after two steps, repeat the command, and omit --load at last."""
    launch(command(corpus, tmp_path / "base", train_iters=1))
    flags = {"dp": 2, "train_iters": 4, "load": tmp_path / "base", "finetune": True, "no_load_optim": True}
    launch(command(corpus, tmp_path / "uninterrupted", losses_only=True, **flags), 2)
    launch(command(corpus, tmp_path / "run", **flags, exit_interval=2), 2)
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    launch(command(corpus, tmp_path / "run", **flags), 2)
    expected, run = ([record["loss"] for record in records(tmp_path / name)] for name in ("uninterrupted", "run"))
    assert run == expected
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    evaluation = {name: value for name, value in flags.items() if name != "finetune"}
    launch(command(corpus, tmp_path / "run", **evaluation, skip_train=True, eval_iters=1), 2)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    code, errors = launch_and_fail(command(corpus, tmp_path / "run", dp=2, train_iters=4), 2)
    assert code == 2 and "contains another run" in errors
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before[tmp_path / "run" / "metrics.jsonl"]
    assert not list(tmp_path.rglob(".slm_run.lock"))
