"""Test that a run falls back to its newest intact checkpoint, names the damage, and deletes nothing intact."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_slm.checkpoint.adoption import adopt_settings
from megatron_slm.config.flags import parse
from megatron_slm.config.recipe import with_settings
from megatron_slm.reference.replica import check_reference
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.tiny import command, launch, losses, make_corpus, run_each
from megatron_slm.tokenizers.tokenizer import build_run_tokenizer
from megatron_slm.training.fallback import verified_start
from megatron_slm.training.preflight import resolve_values
from megatron_slm.training.save_directory import remove_leftovers
from megatron_slm.training.start import Start, plan_start

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Train three steps, each with a checkpoint."""
    directory = tmp_path_factory.mktemp("trained")
    corpus = make_corpus(directory / "corpus", 1)
    launch(command(corpus, directory / "run", train_iters=3, save_interval=1, eval_iters=0))
    return corpus, directory / "run"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _nest(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _replace_by_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("__0_0.distcp", _flip),
    ("__0_1.distcp", _cut),
    (".metadata", _empty),
    (".metadata", _replace_by_directory),
    ("common.pt", Path.unlink),
    ("common.pt", _replace_by_broken_link),
    ("metadata.json", _flip),
    ("config.yaml", _flip),
    ("data.json", _empty),
    ("manifest.json", _flip),
    ("manifest.json", _empty),
    ("manifest.json", _nest),
    ("manifest.json", Path.unlink),
    ("manifest.json", _replace_by_directory),
    ("manifest.json", _replace_by_pipe),
]


def copies(trained: tuple[str, Path], directory: Path, number: int) -> list[Path]:
    """Return copies of the run, with the times of its files."""
    return [Path(shutil.copytree(trained[1], directory / str(copy))) for copy in range(number)]


def resume(corpus: str, run: Path, *flags: str) -> list[str]:
    return [*command(corpus, run, load=run, train_iters=3, save_interval=1, eval_iters=0), *flags]


def start(argv: list[str]) -> Start:
    """Return the verified start of a command line, without running it."""
    config = resolve_values(parse(argv).config, 1)
    return verified_start(plan_start(config), config)


def directory_of(start: Start) -> Path:
    assert start.checkpoint is not None
    return start.checkpoint.directory


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_damage_of_the_newest_checkpoint_is_named(
    tmp_path: Path,
    trained: tuple[str, Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], object],
) -> None:
    (run,) = copies(trained, tmp_path, 1)
    damage(run / "iter_0000003" / name)
    found = start(resume(trained[0], run))
    errors = capsys.readouterr().err
    assert "iter_0000003" in errors and name in errors
    assert "step 3 is damaged. Using step 2, the newest intact checkpoint" in errors
    assert directory_of(found) == run / "iter_0000002" and "step 3 is damaged" in found.describe(None)


TRACKERS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "missing": (Path.unlink, 3, f"{TRACKER} is missing"),
    "empty": (_empty, 3, f"{TRACKER} is damaged"),
    "words": (lambda path: path.write_text("newest"), 3, f"{TRACKER} is damaged"),
    "long": (lambda path: path.write_text("3" * 5000), 3, f"{TRACKER} is damaged"),
    "directory": (_replace_by_directory, 3, f"{TRACKER} is damaged"),
    "gone": (lambda path: path.write_text("9"), 3, f"step 9 of {TRACKER} does not exist"),
    "stale": (lambda path: (path.write_text("1"), os.utime(path, (1, 1))), 3, f"{TRACKER} names step 1"),
    "edited": (lambda path: path.write_text("1"), 1, ""),
}


@pytest.mark.parametrize("kind", TRACKERS)
def test_wrong_tracker_files_are_survived(tmp_path: Path, trained: tuple[str, Path], kind: str) -> None:
    """A tracker file that was edited to an earlier step is respected."""
    damage, step, note = TRACKERS[kind]
    (run,) = copies(trained, tmp_path, 1)
    damage(run / TRACKER)
    found = start(resume(trained[0], run))
    assert directory_of(found) == run / f"iter_{step:07d}" and note in found.describe(None)


def test_incomplete_copies_are_not_checkpoints_of_another_trainer(tmp_path: Path, trained: tuple[str, Path]) -> None:
    """A copy that was interrupted lacks any of its files; directories with other names are not steps."""
    (run,) = copies(trained, tmp_path, 1)
    for name in ("manifest.json", "config.yaml"):
        (run / "iter_0000003" / name).unlink()
    shutil.copytree(run / "iter_0000001", run / "iter_00000002")
    assert directory_of(start(resume(trained[0], run))) == run / "iter_0000002"


def test_damage_of_several_checkpoints(tmp_path: Path, trained: tuple[str, Path]) -> None:
    """Steps are tried in descending order; a step or directory that is given has no alternative."""
    corpus = trained[0]
    two, everything = copies(trained, tmp_path, 2)
    for run in (two, everything):
        _flip(run / "iter_0000003" / "__0_0.distcp")
        shutil.rmtree(run / "iter_0000002")
        (run / "iter_0000002").mkdir()
    _cut(everything / "iter_0000001" / "common.pt")
    assert directory_of(start(resume(corpus, two))) == two / "iter_0000001"
    with pytest.raises(ConfigError, match=r"iter_0000003 is damaged.*No step of .* is intact .tried 3, 1."):
        start(resume(corpus, everything))
    for given in (["--ckpt-step", "3"], ["--load", str(two / "iter_0000003")]):
        with pytest.raises(ConfigError, match=r"content of __0_0\.distcp does not match its checksum"):
            start(resume(corpus, two, *given))
    finetuned = start(command(corpus, tmp_path / "new", load=two, finetune=True, train_iters=1))
    evaluated = start(command(corpus, load=two, skip_train=True))
    assert directory_of(finetuned) == directory_of(evaluated) == two / "iter_0000001"


def test_a_step_that_was_abandoned_is_the_last_choice(tmp_path: Path, trained: tuple[str, Path]) -> None:
    """Step 3 is abandoned by a tracker file that was edited to step 2."""
    (run,) = copies(trained, tmp_path, 1)
    (run / TRACKER).write_text("2")
    for damaged, used in ((2, 1), (1, 3)):
        _flip(run / f"iter_000000{damaged}" / "__0_0.distcp")
        assert directory_of(start(resume(trained[0], run))) == run / f"iter_000000{used}"


def test_repeated_steps_are_equal_and_nothing_is_deleted(tmp_path: Path, trained: tuple[str, Path]) -> None:
    """The save of the repeated step leaves the damaged checkpoint; one outside of --save keeps its name."""
    corpus = trained[0]
    run, base = copies(trained, tmp_path, 2)
    for each in (run, base):
        _flip(each / "iter_0000003" / "__0_0.distcp")
    (tmp_path / "link").symlink_to(run)
    (run / "iter_0000001.partial").mkdir()
    new = command(corpus, tmp_path / "new", load=base, train_iters=3, eval_iters=0)
    resumed, continued = run_each([*resume(corpus, run), "--load", str(tmp_path / "link")], new)
    assert resumed.code == continued.code == 0, (resumed, continued)
    assert losses(run) == losses(trained[1]) and losses(tmp_path / "new") == losses(run)[2:]
    assert f"resuming from {tmp_path}/link/iter_0000002" in resumed.output and "step 3 is damaged" in resumed.output
    assert "removed iter_0000001.partial" in resumed.errors
    names = [f"iter_000000{step}" for step in (1, 2, 3)]
    assert sorted(path.name for path in run.glob("iter_*")) == [*names, "iter_0000003.damaged"]
    assert sorted(path.name for path in base.glob("iter_*")) == names
    assert (run / TRACKER).read_text() == "3\n" and start(resume(corpus, run)).damaged == ()


def test_reference_model_has_no_fallback(tmp_path: Path, trained: tuple[str, Path]) -> None:
    corpus = trained[0]
    (run,) = copies(trained, tmp_path, 1)
    _flip(run / "iter_0000003" / "__0_0.distcp")
    argv = command(corpus, objective="slm", reference_load=run, train_iters=1)
    config = resolve_values(parse(argv).config, 1)
    tokenizer = build_run_tokenizer(config)
    with pytest.raises(ConfigError, match=r"--reference-load: .*__0_0\.distcp.* by giving its iter_\* directory"):
        check_reference(config, tokenizer, verify=True)
    check_reference(with_settings(config, {"reference_ckpt_step": 2}), tokenizer, verify=True)


def test_damaged_configuration_with_use_checkpoint_args(tmp_path: Path, trained: tuple[str, Path]) -> None:
    (run,) = copies(trained, tmp_path, 1)
    _empty(run / "iter_0000003" / "config.yaml")
    note = parse(resume(trained[0], run, "--use-checkpoint-args"), adopt_settings).note
    assert f"--use-checkpoint-args: from {run}/iter_0000002" in note


def test_leftovers_of_interrupted_saves_are_removed(tmp_path: Path) -> None:
    for name in ("iter_0000001.partial", "iter_0000002.replaced", ".deleted-iter_0000003", "iter_0000004.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").touch()
    (tmp_path / "iter_0000004.partial" / "notes.txt").touch()
    (tmp_path / "iter_0000005.partial").symlink_to(tmp_path)
    (tmp_path / "iter_0000006.partial").touch()
    remove_leftovers(tmp_path)
    kept = ["iter_0000002", "iter_0000004.partial", "iter_0000005.partial", "iter_0000006.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
