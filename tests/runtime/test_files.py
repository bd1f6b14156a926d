"""Atomic writes: the target has the previous or the complete new content, and other files are not replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_slm.runtime import files
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import atomic_path, check_output_file, check_replaceable, write_text


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_write_replaces_the_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    path.chmod(0o640)
    write_text(path, "new τ")
    assert path.read_text(encoding="utf-8") == "new τ"
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["report.json"]


@pytest.mark.parametrize("stage", ["write", "sync", "replace"])
def test_a_full_disk_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    path = tmp_path / "tok.model"
    path.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if stage == "sync":
        monkeypatch.setattr(files, "sync", fail)
    elif stage == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    message = r"--output-prefix .*tok.model cannot be written: No space left"
    with pytest.raises(ConfigError, match=message), atomic_path(path, "--output-prefix") as temporary:
        temporary.write_text("new")
        if stage == "write":
            fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["tok.model"]


def test_another_error_of_the_block_passes_and_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_publishing_flushes_the_file_before_and_the_directory_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, final = tmp_path / "partial", tmp_path / "final"
    partial.write_text("new")
    flushed: list[tuple[Path, bool]] = []
    monkeypatch.setattr(files, "sync", lambda path: flushed.append((path, final.exists())))
    files.publish(partial, final)
    assert flushed == [(partial, False), (tmp_path, True)] and final.read_text() == "new"


@pytest.mark.parametrize("kind", ["device", "pipe", "directory"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path = Path(os.devnull) if kind == "device" else tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    mode = path.stat().st_mode
    with pytest.raises(ConfigError, match="is not replaced"):
        write_text(path, "text")
    assert path.stat().st_mode == mode


def test_a_file_that_is_not_ours_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text('{"text": "raw"}')
    with pytest.raises(ConfigError, match="was not written by megatron_slm"):
        write_text(path, "{}", is_ours=lambda found: "tokenizer" in found.read_text())
    assert path.read_text() == '{"text": "raw"}'
    check_replaceable(tmp_path / "absent", is_ours=lambda found: False)


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "real", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"


def test_the_temporary_name_keeps_the_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "plot.png") as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path
        temporary.write_bytes(b"")


def test_the_temporary_name_of_a_link_has_the_suffix_of_the_link(tmp_path: Path) -> None:
    """Its target may be a file of a store, named by its content."""
    (tmp_path / "plot.png").symlink_to(tmp_path / "store")
    with atomic_path(tmp_path / "plot.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"new")
    assert (tmp_path / "store").read_bytes() == b"new" and names(tmp_path) == ["plot.png", "store"]


def test_a_missing_directory_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        write_text(tmp_path / "missing" / "file", "text")


def test_a_name_as_long_as_possible_is_written(tmp_path: Path) -> None:
    """The temporary name is longer."""
    for name in ("x" * 251 + ".txt", "é" * 125 + ".txt"):
        check_output_file(tmp_path / name, "--output")
        write_text(tmp_path / name, "text", "--output")
        assert (tmp_path / name).read_text() == "text"


def test_output_that_cannot_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no" / "a", "does not exist"), ("/proc/a", "cannot be written"), ("-", "a path")):
        with pytest.raises(ConfigError, match=message):
            check_output_file(path, "--output")
    check_output_file(tmp_path / "a", "--output")
    assert not list(tmp_path.iterdir())
