"""Test the choice of checkpoints of tools/show_selection.py: damaged steps, and notes on runs that differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_slm.checkpoint import source as sources
from megatron_slm.cli.selection_checkpoints import choose_checkpoints
from megatron_slm.cli.show_selection import parse_arguments
from megatron_slm.config.recipe import from_flat_dict
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError, UnusableFileError

DAMAGED = 2  # step


@dataclass(frozen=True)
class Source:
    """Stand for a checkpoint of a run with two reference models."""

    directory: Path
    step: int | None
    is_resumable = False

    def check(self) -> None:
        if self.step == DAMAGED or self.directory.name == "damaged":
            raise UnusableFileError(f"step {self.step} is damaged")

    def config(self) -> RunConfig:
        references = ["rm-web", "rm-math"] if self.directory.name != "rm" else []
        return from_flat_dict({"objective": "slm", "seq_length": 8, "reference_load": references}, "test")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def find(path: str, step: int | None, flag: str) -> Source:
        return Source(Path(path) if step is None else Path(path) / f"iter_{step:07d}", step)

    monkeypatch.setattr(sources, "find_source", find)
    for step in (1, DAMAGED, 3):
        (tmp_path / "run" / f"iter_{step:07d}").mkdir(parents=True)
    return tmp_path / "run"


def choose(*argv: object) -> list[int | None]:
    choices, _ = choose_checkpoints(parse_arguments(["--input", "text", *map(str, argv)]))
    return [choice.step for choice in choices]


def test_all_steps_leave_out_only_steps_that_are_not_requested(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--all-steps", "--slm-score", "token-loss")
    assert choose("--load", run, *flags) == [1, 3]
    assert "step 2 is left out" in capsys.readouterr().err
    for requested in (f"{run}:{DAMAGED}", run.parent / "damaged"):
        with pytest.raises(ConfigError, match="is damaged"):
            choose("--load", requested, run, *flags)


@pytest.mark.parametrize("score", ["excess", "token-loss"])
def test_one_of_several_reference_models_is_noted(run: Path, capsys: pytest.CaptureFixture[str], score: str) -> None:
    choose("--load", f"{run}:3", "--reference-load", run.parent / "rm", "--slm-score", score)
    is_noted = "run used 2 reference models; the selection is shown with that of --reference-load" in (
        capsys.readouterr().err
    )
    assert is_noted == (score == "excess")
