"""Test the deletion of superseded checkpoints, and the check of the free disk space."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.flags import parse
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.model.size import checkpoint_bytes
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.tiny import command, make_corpus, run_each
from megatron_slm.training import free_space
from megatron_slm.training.free_space import check_space, kept_checkpoints
from megatron_slm.training.preflight import resolve_values
from megatron_slm.training.retention import Retention

TRACKER = "latest_checkpointed_iteration.txt"
Usage = namedtuple("Usage", "total used free")


def save_steps(run: Path, steps: range, **flags: Any) -> list[int]:
    """Save empty checkpoints as a run with the flags does, and return the steps that are left."""
    config = with_settings(RunConfig(), {"save": str(run), **flags})
    retention = Retention(config)
    for step in steps:
        retention.before_save()
        (run / f"iter_{step:07d}").mkdir(parents=True, exist_ok=True)
        (run / f"iter_{step:07d}" / "manifest.json").touch()
        (run / TRACKER).write_text(f"{step}\n")
        retention.after_save(step)
    return sorted(int(path.name.removeprefix("iter_")) for path in run.glob("iter_*"))


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"save_retain_interval": 3}, [3, 6, 7]),
        ({"keep_last": 1}, [7]),
        ({"keep_last": 2}, [6, 7]),
        ({"keep_last": 2, "save_retain_interval": 3}, [3, 6, 7]),
        ({"keep_last": 2, "save_retain_interval": 4}, [4, 6, 7]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=str,
)
def test_superseded_checkpoints_are_deleted(tmp_path: Path, flags: dict[str, int], left: list[int]) -> None:
    assert save_steps(tmp_path, range(1, 8), **flags) == left


def test_checkpoints_that_are_read_abandoned_linked_or_foreign_are_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_steps(run, range(1, 10))
    (run / "iter_0000003" / "manifest.json").unlink()  # of another program
    shutil.move(run / "iter_0000004", tmp_path / "elsewhere")
    (run / "iter_0000004").symlink_to(tmp_path / "elsewhere")
    flags = {"load": str(run), "ckpt_step": 2, "reference_load": [str(run)], "reference_ckpt_step": 1, "keep_last": 1}
    assert save_steps(run, range(6, 8), **flags) == [1, 2, 3, 4, 7, 8, 9], "steps 8 and 9 are after the saved ones"
    (run / "iter_0000007" / "manifest.json").unlink()
    assert save_steps(run, range(8, 10), save_retain_interval=10) == [1, 2, 3, 4, 7, 9]


def test_free_space_is_checked_at_the_start_and_before_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path / "corpus", 1)
    argv = command(corpus, tmp_path / "run", train_iters=40, save_interval=1, eval_iters=0, exit_interval=2)
    (outcome,) = run_each(argv)
    assert outcome.code == 0, outcome.errors
    files = [path for path in (tmp_path / "run" / "iter_0000001").iterdir() if path.suffix == ".distcp"]
    size = sum(path.stat().st_size for path in files)
    (planned,) = run_each([*argv, "--load", str(tmp_path / "run"), "--dry-run"])
    shown = free_space.format_size(int(0.9 * size)), free_space.format_size(size)
    row = next(line for line in planned.output.splitlines() if "checkpoints" in line)
    assert float(shown[0].split()[0]) - 0.1 <= float(row.split("MiB")[0].split()[-1]) <= float(shown[1].split()[0]), row
    for free, reclaimed, total, fits in ((99, 0, 1, False), (100, 0, 1, True), (99, 1, 1, True), (0, 0, 0, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free, total=total: Usage(total, 0, free))
        if fits:
            assert check_space(tmp_path / "new" / "run", 100, reclaimed) == (free + reclaimed if total else None)
        else:
            with pytest.raises(ConfigError, match=r"--save .*: a checkpoint needs .* are free. Free disk space"):
                check_space(tmp_path, 100, reclaimed)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [({}, 1), ({"save_interval": 9}, 12), ({"save_interval": 10, "save_retain_interval": 50}, 4)]
    + [({"save_interval": 10, "keep_last": number}, kept) for number, kept in ((3, 4), (50, 10))],
    ids=str,
)
def test_number_of_checkpoints_at_the_same_time(flags: dict[str, int], kept: int) -> None:
    assert kept_checkpoints(with_settings(RunConfig(), flags).checkpoint, 100) == kept


def test_size_of_a_checkpoint_depends_on_the_optimizer() -> None:
    sizes = []
    for flags in ([], ["--bf16"], ["--no-save-optim"], ["--optimizer", "sgd"], ["--use-distributed-optimizer"]):
        config = resolve_values(parse([*command("corpus", train_iters=1), *flags]).config, 1)
        sizes.append(checkpoint_bytes(config, 100))
    assert [size / sizes[2] for size in sizes] == [3, 3.5, 1, 2, 4]
