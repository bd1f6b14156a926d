"""Test that a checkpoint which only one rank cannot read, such as on a host's disk, is refused on every rank."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.runtime import reporting
from megatron_slm.testing.ranks import run_ranks, shared_process_group
from megatron_slm.testing.tiny import command, launch, make_corpus

SKIP = "--no-slm-verify-checksums"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2000] ^= 4  # in a tensor: torch would read it
    path.write_bytes(content)


def _overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def _deny(path: Path) -> None:
    path.with_name(f"{path.name}.denied").touch()


# file, damage, additional flags, part of the message
DAMAGES: list[tuple[str, Callable[[Path], None], list[str], str]] = [
    ("__0_0.distcp", _flip, [], "content of __0_0.distcp does not match its checksum"),
    ("__0_0.distcp", _cut, [], "is damaged: __0_0.distcp has"),
    ("common.pt", Path.unlink, [SKIP], "is damaged: common.pt is missing"),
    (".metadata", _overwrite, [SKIP], "is damaged"),
    ("common.pt", _overwrite, [SKIP], "is damaged"),
    ("common.pt", _deny, [], "common.pt cannot be read (Permission denied)"),
    ("common.pt", _deny, [SKIP], "common.pt cannot be read (Permission denied)"),
    (".metadata", _deny, [SKIP], ".metadata cannot be read (Permission denied)"),
    ("__0_0.distcp", _deny, [], "__0_0.distcp cannot be read (Permission denied)"),
    ("__0_0.distcp", _deny, [SKIP], "__0_0.distcp cannot be read (Permission denied)"),
    ("__0_0.distcp", _overwrite, [SKIP], "is damaged"),
]
USES = {"--load": {}, "--reference-load": {"objective": "slm"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp("trained")
    corpus = make_corpus(directory / "corpus", 1)
    launch(command(corpus, directory / "run", train_iters=1, eval_iters=0))
    return corpus, directory / "run"


@pytest.mark.parametrize("flag", USES)
def test_checkpoint_unreadable_on_one_rank(tmp_path: Path, trained: tuple[str, Path], flag: str) -> None:
    """Each rank has a copy, as on the local disks of two hosts."""
    corpus, run = trained
    commands = []
    for number, (name, damage, flags, _) in enumerate(DAMAGES):
        for rank in (0, 1):
            shutil.copytree(run, tmp_path / str(rank) / str(number))
        damage(tmp_path / "1" / str(number) / "iter_0000001" / name)
        argv = command(corpus, dp=2, train_iters=2, eval_iters=0, **USES[flag])
        commands.append([*argv, flag, str(number), *flags])
    first, second = run_ranks(_main_in_directory_of_rank, 2, tmp_path, commands, initialize=False, timeout=100)
    for (name, damage, flags, message), one, other in zip(DAMAGES, first, second, strict=True):
        case = (name, damage.__name__, flags, one, other)
        assert one[0] == other[0] == 2, case
        assert message in one[1] and flag in one[1] and "Traceback" not in one[1] + other[1], case


def _main_in_directory_of_rank(
    rank: int, world_size: int, directory: Path, commands: list[list[str]]
) -> list[tuple[int, str]]:
    """Run the trainer several times within one process group."""
    os.chdir(directory / str(rank))
    reporting.SECONDS_FOR_RANK_0 = reporting.SECONDS_FOR_OTHERS = 0.0
    results = []
    denying = mock.patch.object(io, "open", _denying(io.open)), mock.patch.object(builtins, "open", _denying(open))
    with shared_process_group(), denying[0], denying[1]:
        for argv in commands:
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                code = main(argv)
            results.append((code, errors.getvalue()))
    return results


def _denying(plain: Any) -> Any:
    """Return an open() without access to the denied files, since permissions do not apply to root."""

    def denying(path: Any, *positional: Any, **options: Any) -> Any:
        if isinstance(path, str | os.PathLike) and Path(f"{os.fspath(path)}.denied").exists():
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *positional, **options)

    return denying
