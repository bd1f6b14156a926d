"""Test that damaged, mismatched and unreadable checkpoint files are refused by name, and never run code."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import filesystem

from megatron_slm.checkpoint import weights
from megatron_slm.checkpoint.source import find_source
from megatron_slm.checkpoint.weights import explained_load, verify_checkpoint
from megatron_slm.config.checkpoint_files import MANIFEST_FILE, Manifest, file_sizes, read_manifest, saved_config
from megatron_slm.mcore.pickles import UnsafePickleError, restricted_loads, restricted_pickles
from megatron_slm.runtime import checksums
from megatron_slm.runtime.checksums import file_checksums, text_checksum
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.tiny import command, launch, launch_and_fail, make_corpus

NAMES = (".metadata", "__0_0.distcp", "common.pt", "config.yaml")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Create a checkpoint directory with arbitrary file contents and their manifest."""
    directory = tmp_path / "run" / "iter_0000003"
    directory.mkdir(parents=True)
    (directory.parent / "latest_checkpointed_iteration.txt").write_text("3\n")
    for number, name in enumerate(NAMES):
        (directory / name).write_bytes(bytes([number]) * (1000 + number))
    write_manifest(directory)
    return directory


def write_manifest(directory: Path) -> None:
    """Write a valid manifest of the current files, as an attacker could."""
    names = [name for name in file_sizes(directory) if name != MANIFEST_FILE]
    found = file_checksums([directory / name for name in names], "--save")
    sizes = {name: size for name, size in file_sizes(directory).items() if name in names}
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    manifest = Manifest(3, 48, {"name": "t", "fingerprint": "f", "vocab_size": 9}, {"tensor": 1}, sizes)
    Manifest(**{**vars(manifest), "checksums": dict(zip(names, found, strict=True))}).write(directory, text_checksum)


def opened(directory: Path, *, verify: bool = True) -> Path:
    found = find_source(str(directory.parent), None, "--load").directory
    verify_checkpoint(found, "--load", checksums=verify)
    return found


def test_intact_checkpoint_is_opened(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert opened(checkpoint) == checkpoint
    assert opened(checkpoint, verify=False) == checkpoint
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_flipped_bit_is_rejected(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--load: .* is damaged: the content of {name} does not match its checksum"):
        opened(checkpoint)
    assert opened(checkpoint, verify=False) == checkpoint


def test_file_of_another_step_is_refused(checkpoint: Path) -> None:
    """The file is valid and has the same size."""
    (checkpoint / "__0_0.distcp").write_bytes(bytes(1001))
    with pytest.raises(ConfigError, match=r"__0_0\.distcp does not match"):
        opened(checkpoint)


def test_directory_name_of_another_step_is_refused(checkpoint: Path) -> None:
    renamed = checkpoint.rename(checkpoint.with_name("iter_0000004"))
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("4\n")
    with pytest.raises(ConfigError, match=r"iter_0000004 holds step 3 .* Rename it to iter_0000003"):
        opened(renamed)
    with pytest.raises(ConfigError, match=r"or choose another step by giving its iter_\* directory"):
        read_manifest(renamed, "--reference-load")


def test_damaged_configuration_is_reported_as_damaged_checkpoint(checkpoint: Path) -> None:
    for damage in (lambda path: path.write_bytes(b"\xff"), Path.unlink):
        damage(checkpoint / "config.yaml")
        with pytest.raises(ConfigError, match=r"iter_0000003 is damaged: .*config\.yaml.* Copy the checkpoint again"):
            saved_config(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(step=4),
        lambda content: content["files"].update({"common.pt": 999}),
        lambda content: content["checksums"].update({"common.pt": content["checksums"][".metadata"]}),
        lambda content: content.pop("checksum"),
        lambda content: content.pop("checksums"),
        lambda content: content.update(color="red"),
        lambda content: content.pop("layout"),
    ],
)
def test_edited_manifest_is_refused(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = checkpoint / MANIFEST_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"--load: .*manifest\.json is damaged"):
        opened(checkpoint)


def test_checkpoint_of_an_earlier_version_is_opened_with_a_note(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / MANIFEST_FILE
    content = json.loads(path.read_text())
    del content["checksum"], content["checksums"]
    path.write_text(json.dumps(content))
    assert opened(checkpoint) == checkpoint
    assert "has no checksums" in capsys.readouterr().err
    assert read_manifest(checkpoint, "--load").step == 3


@pytest.mark.parametrize("name", ["common.pt", MANIFEST_FILE])
def test_unreadable_file_is_reported(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Permissions do not apply to root, so the error is injected."""
    plain = Path.open

    def refusing(path: Path, *positional: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *positional, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(ConfigError, match=rf"--load: .*{name} cannot be read \(Permission denied\)"):
        opened(checkpoint)


def test_checksum_covers_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 7)
    path = tmp_path / "file"
    seen = set()
    for place in range(30):
        content = bytearray(30)
        content[place] = 1
        path.write_bytes(content)
        seen.add(file_checksums([path], "--load")[0])
    assert len(seen) == 30
    path.write_bytes(b"head" + bytes(10))
    other = tmp_path / "other"
    other.write_bytes(b"HEAD" + bytes(10))
    one, two = file_checksums([path, other], "--load", start=4)
    assert one == two


class Attack:
    """Serialize as a call of ``function``, which leaves a mark."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def attacks(mark: Path) -> dict[str, Any]:
    code = f"open({str(mark)!r}, 'w').close()"
    return {
        "system": Attack(os.system, f"touch {mark}"),
        "eval": Attack(builtins.eval, code),
        "exec": Attack(builtins.exec, code),
        "getattr": Attack(getattr, str, "format"),
        "import": Attack(builtins.__import__, "antigravity"),
        "nested": Attack(torch.storage._load_from_bytes, pickled(Attack(os.system, f"touch {mark}"))),
        "nested pickle": Attack(pickle.loads, pickle.dumps(Attack(os.system, f"touch {mark}"))),
        "load": Attack(torch.load, io.BytesIO(pickled(Attack(os.system, f"touch {mark}")))),
    }


def pickled(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["system", "eval", "exec", "getattr", "import", "nested", "nested pickle", "load"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_pickle_runs_code(tmp_path: Path, name: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    attack = attacks(mark)[name]
    for content in (attack, {"weights": [torch.ones(2), attack]}):
        with pytest.raises(UnsafePickleError):
            restricted_loads(pickle.dumps(content, protocol))
        for file in (tmp_path / "common.pt", io.BytesIO(pickled(content))):
            if isinstance(file, Path):
                file.write_bytes(pickled(content))
            with restricted_pickles(), pytest.raises(UnsafePickleError):
                torch.load(file, weights_only=False)
    assert not mark.exists()


@pytest.mark.parametrize("text", ["cos\nsystem\n(S'true'\ntR.", "cbuiltins\ngetattr.__call__\n.", "ctorch\nload\n."])
def test_dotted_and_unlisted_names_are_refused(text: str) -> None:
    with pytest.raises(UnsafePickleError):
        restricted_loads(text.encode())


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    with restricted_pickles(), pytest.raises(UnsafePickleError, match=f"{path} holds a TorchScript program"):
        torch.load(path, weights_only=False)


def test_saved_objects_are_read(tmp_path: Path) -> None:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": {"model-parallel-rng": torch.get_rng_state()},
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "dtype": torch.float16,
        "bytes": b"\x00\xff",
    }
    with restricted_pickles():
        read = torch.load(io.BytesIO(pickled(state)), weights_only=False)
    random.setstate(read["python"])
    np.random.set_state(read["numpy"])
    assert torch.equal(read["torch"], state["torch"]) and read["bytes"] == state["bytes"]
    assert read["bf16"].dtype is torch.bfloat16 and read["dtype"] is torch.float16


def test_readers_are_restored_after_the_block() -> None:
    load, module = torch.load, filesystem.pickle
    with restricted_pickles():
        assert torch.load is not load and filesystem.pickle is not module
    assert torch.load is load and filesystem.pickle is module


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EOFError("Ran out of input"), "is damaged: Ran out of input"),
        (pickle.UnpicklingError("invalid load key"), "is damaged: invalid load key"),
        (PermissionError(13, "Permission denied", "x.distcp"), r"x.distcp cannot be read \(Permission denied\)"),
        (KeyError("decoder.bias from model not in state dict"), "does not match this run"),
        (UnsafePickleError("common.pt holds os.system"), "common.pt holds os.system. It could run code"),
    ],
)
def test_error_message_depends_on_the_cause(tmp_path: Path, error: Exception, message: str) -> None:
    with pytest.raises(ConfigError, match=message), explained_load(tmp_path, "--load"):
        raise weights.CheckpointException("read", {1: (error, None)})  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp("trained")
    corpus = make_corpus(directory / "corpus", 1)
    launch(command(corpus, directory / "run", train_iters=1, eval_iters=0))
    return corpus, directory / "run"


def _attack_metadata(directory: Path, attack: Any) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(attack))


def _attack_common(directory: Path, attack: Any) -> None:
    (directory / "common.pt").write_bytes(pickled({"args": attack}))


def _attack_object(directory: Path, attack: Any) -> None:
    """Append the attack to a data file, and reference it in the metadata."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.startswith("rng/"))
    info = metadata.storage_data[index]
    data, content = directory / info.relative_path, pickled([attack])
    info.offset, info.length = data.stat().st_size, len(content)
    data.write_bytes(data.read_bytes() + content)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("place", "file"),
    [(_attack_metadata, ".metadata"), (_attack_common, "common.pt"), (_attack_object, ".distcp")],
)
def test_code_in_a_checkpoint_does_not_run(
    tmp_path: Path, trained: tuple[str, Path], place: Callable[[Path, Any], None], file: str
) -> None:
    """Manifest and checksums are valid."""
    corpus, run = trained
    shutil.copytree(run, tmp_path / "run")
    directory = tmp_path / "run" / "iter_0000001"
    place(directory, Attack(os.system, f"touch {tmp_path / 'mark'}"))
    manifest = read_manifest(directory, "--load")
    names = sorted(manifest.files)
    found = dict(zip(names, file_checksums([directory / name for name in names], "--save"), strict=True))
    manifest = replace(manifest, files={name: file_sizes(directory)[name] for name in names}, checksums=found)
    manifest.write(directory, text_checksum)
    flags = [{"load": tmp_path / "run"}, {"load": tmp_path / "run", "dry_run": True}]
    if place is not _attack_object:  # a random state, which a reference model has no use for
        flags.append({"objective": "slm", "reference_load": tmp_path / "run"})
    for each in flags:
        code, errors = launch_and_fail(command(corpus, train_iters=2, **each))
        assert code == 2 and "Traceback" not in errors
        assert f"{file} holds posix.system" in errors and str(directory) in errors and "could run code" in errors
    assert not (tmp_path / "mark").exists()


def test_reference_checkpoint_is_verified(tmp_path: Path, trained: tuple[str, Path]) -> None:
    """A damaged file of the reference model is refused, unless the flag skips the check."""
    corpus, run = trained
    shutil.copytree(run, tmp_path / "run")
    data = tmp_path / "run" / "iter_0000001" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[-2000] ^= 4  # in a tensor: torch would read it
    data.write_bytes(content)
    cache = tmp_path / "cache"
    slm = {"objective": "slm", "reference_load": tmp_path / "run", "train_iters": 1, "eval_iters": 0}
    code, errors = launch_and_fail(command(corpus, **slm, data_cache_path=cache))
    assert not cache.exists(), "no index is built before the reference model is verified"
    assert code == 2 and "--reference-load: " in errors and "the content of __0_0.distcp does not match" in errors
    launch(command(corpus, **slm, no_slm_verify_checksums=True))
