"""Test JSONL after a resume and a full disk, readable TensorBoard files, and continued W&B runs."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_slm.config.recipe import with_settings
from megatron_slm.config.relations.files import unwritable_outputs
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.metrics_file import prepare_metrics_file
from megatron_slm.training.sinks import WandbSink, open_sinks, tensorboard_sink

RANK_0: Any = SimpleNamespace(is_logging_rank=True)


def config_of(path: Path, **training: Any) -> RunConfig:
    return with_settings(RunConfig(), {"slm_metrics_file": str(path), **training})


def write(path: Path, resumed_step: int, steps: list[int], **training: Any) -> None:
    (sink,) = open_sinks(config_of(path, **training), RANK_0, resumed_step)
    for step in steps:
        sink.write({"kind": "train", "step": step})
    sink.close()


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resume_drops_repeated_steps(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    write(path, 0, [1, 2, 3, 4, 5])
    with path.open("a") as file:
        file.write('{"kind": "tr')  # killed while writing
    write(path, 3, [4])
    assert steps_of(path) == [1, 2, 3, 4]


def test_damaged_lines_do_not_affect_later_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1])
    with path.open("ab") as file:
        file.write(b'{"kind": "tr{"kind": "train", "step": 2}\n' + b"\0" * 40 + b"\n")
    write(path, 1, [])
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 2}\n')
    write(path, 2, [3])
    assert steps_of(path) == [1, 2, 3]


def test_new_run_keeps_earlier_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1, 2])
    write(path, 0, [1])
    write(path, 0, [1, 2, 3])
    assert (steps_of(path), steps_of(tmp_path / "metrics.jsonl.1")) == ([1, 2, 3], [1, 2])
    assert steps_of(tmp_path / "metrics.jsonl.2") == [1]
    assert f"kept as {path}.1" in capsys.readouterr().err


def test_events_are_those_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A NaN before the first checkpoint is no event of the next start; one that a resume goes back before is."""
    path, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    for resumed_step, training, kept in ((3, {}, False), (0, {"skip_train": True}, False), (0, {}, True)):
        events.write_text('{"kind": "event", "step": 5}\n')
        write(path, resumed_step, [], slm_events_file=str(events), **training)
        assert events.exists() is not kept and (tmp_path / "events.jsonl.1").exists() is kept
    assert f"--slm-events-file {events}: the events of an earlier run were kept as" in capsys.readouterr().err


def test_link_to_a_metrics_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "metrics.jsonl")
    for steps in ([1, 2], [1]):
        write(tmp_path / "link.jsonl", 0, steps)
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (steps_of(tmp_path / "metrics.jsonl"), steps_of(tmp_path / "metrics.jsonl.1")) == ([1], [1, 2])


def test_evaluation_of_an_older_checkpoint_keeps_all_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1, 2, 3])
    write(path, 1, [1], skip_train=True)
    assert steps_of(path) == [1, 2, 3, 1]


@pytest.mark.parametrize("content", ["notes of a person\n", '{"text": "a corpus"}\n', "[1]\n", '{"step": 1}', "\0\0"])
@pytest.mark.parametrize("resumed_step", [0, 5])
def test_unrelated_file_is_not_replaced(tmp_path: Path, content: str, resumed_step: int) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(ConfigError, match="was not written by megatron_slm"):
        prepare_metrics_file(path, resumed_step)
    assert path.read_text() == content and [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("resumed_step", [0, 5])
def test_devices_and_pipes_are_appended_to(tmp_path: Path, resumed_step: int) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for path in (pipe, link, Path("/dev/null")):
        write(path, resumed_step, [6])
    assert os.read(reader, 100) == b'{"kind": "train", "step": 6}\n'
    os.close(reader)
    assert pipe.is_fifo() and link.is_symlink() and Path("/dev/null").is_char_device()


def test_linked_metrics_file_remains_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write(tmp_path / "link", 0, [1, 2, 3])
    write(tmp_path / "link", 2, [3])
    assert (tmp_path / "link").is_symlink() and steps_of(tmp_path / "file") == [1, 2, 3]


def test_tensorboard_is_read_back(tmp_path: Path) -> None:
    sink = tensorboard_sink(tmp_path, 0)
    sink.write({"kind": "train", "step": 1, "loss": 2.5, "selection": "ff", "mfu": None})
    sink.write({"kind": "train", "step": 2, "loss": 2.25})
    sink.write({"kind": "eval", "step": 1, "set": "clean", "loss": 3.5})
    sink.close()
    resumed = tensorboard_sink(tmp_path, 1)
    resumed.write({"kind": "train", "step": 2, "loss": 2.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/clean/loss", "train/loss"]
    assert events.Scalars("eval/clean/loss")[0].value == 3.5
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 2.0)]


def test_tensorboard_tolerates_a_full_disk_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        sink = tensorboard_sink(tmp_path, 0)
    assert "--tensorboard-dir" in capsys.readouterr().err
    sink.write({"kind": "train", "step": 1, "loss": 2.5})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.5]


class Wandb:
    """Fake wandb package."""

    class Error(Exception):
        """Base class of the package's errors."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[int] = []
        self.is_down = False

    def init(self, **arguments: Any) -> Wandb:
        self.started.append(arguments)
        return self

    def log(self, scalars: dict[str, float], step: int) -> None:
        if self.is_down:
            raise self.Error("unreachable")
        if step > max(self.logged, default=-1):  # earlier steps are ignored, as by W&B
            self.logged.append(step)

    def finish(self) -> None: ...


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return stand_in


def wandb_config(save: Path | None = None, load: Path | None = None) -> RunConfig:
    paths = {"save": str(save) if save else None, "load": str(load) if load else None}
    return with_settings(RunConfig(), {"wandb_project": "project", **paths})


@pytest.mark.parametrize("leftover", [False, True])
def test_missing_wandb_is_noticed_before_the_run_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftover: bool
) -> None:
    """Also if an offline run has left its directory ``wandb``, which Python imports as a package without content."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)])
    if leftover:
        (tmp_path / "wandb").mkdir()
    importlib.invalidate_caches()
    assert list(unwritable_outputs(wandb_config())) == ["--wandb-project needs the package wandb: pip install wandb."]
    (tmp_path / "wandb").mkdir(exist_ok=True)
    (tmp_path / "wandb" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert not list(unwritable_outputs(wandb_config()))


def test_wandb_directory_must_be_writable(wandb: Wandb, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = with_settings(wandb_config(), {"wandb_save_dir": str(tmp_path / "file" / "logs")})
    assert [message.split(":")[0] for message in unwritable_outputs(config)] == [
        f"--wandb-save-dir {tmp_path / 'file' / 'logs'}"
    ]


def test_resumed_run_continues_its_wandb_run(wandb: Wandb, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    WandbSink(wandb_config(run), 0)
    WandbSink(wandb_config(run, run), 3)
    WandbSink(wandb_config(copy, run), 3)
    WandbSink(wandb_config(None, copy), 3)
    WandbSink(wandb_config(run), 0)  # from scratch again
    identities = [arguments["id"] for arguments in wandb.started]
    assert len(set(identities[:4])) == 1 and identities[4] != identities[0]
    assert {arguments["resume"] for arguments in wandb.started} == {"allow"}


def test_resumed_run_has_each_step_once(wandb: Wandb, tmp_path: Path) -> None:
    """A run that logged five steps and is resumed after the third logs the others again, in the same W&B run."""
    for resumed_step, steps in ((0, range(1, 6)), (3, range(4, 8))):
        sink = WandbSink(wandb_config(tmp_path, tmp_path), resumed_step)
        for step in steps:
            sink.write({"kind": "train", "step": step, "loss": 1.0})
        sink.close()
    assert wandb.logged == list(range(1, 8)) and len({arguments["id"] for arguments in wandb.started}) == 1


def test_wandb_uses_the_run_id_of_the_environment(
    wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    WandbSink(wandb_config(tmp_path), 0)
    assert wandb.started[0]["id"] == "chosen"


def test_unreachable_wandb_does_not_end_the_run(wandb: Wandb, capsys: pytest.CaptureFixture[str]) -> None:
    sink = WandbSink(wandb_config(), 0)
    wandb.is_down = True
    for step in (1, 2):
        sink.write({"kind": "train", "step": step, "loss": 1.0})
    wandb.is_down = False
    sink.write({"kind": "train", "step": 3, "loss": 1.0})
    assert wandb.logged == [3]
    assert capsys.readouterr().err.count("rejects records (unreachable)") == 1
