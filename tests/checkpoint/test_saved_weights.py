"""Test that saved weights include the last update, and that a save that fails on one rank fails on all ranks."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.serialization import load_plain_tensors
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_slm.cli.pretrain import main
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, make_corpus

OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def test_overlapped_gathering_saves_the_updated_weights(tmp_path: Path) -> None:
    """No evaluation precedes the save, since it would also gather the parameters."""
    corpus = make_corpus(tmp_path / "corpus", 1)
    variants = {"overlap": OVERLAP, "plain": OVERLAP[:1]}
    for name, flags in variants.items():
        argv = command(corpus, tmp_path / name, dp=2, train_iters=3, save_interval=2, eval_iters=0)
        launch([*argv, *flags], 2)
    for step in (2, 3):
        overlap, plain = (run_ranks(_tensors, 1, str(tmp_path / name / f"iter_{step:07d}"))[0] for name in variants)
        assert overlap.keys() == plain.keys() and any("linear_qkv" in key for key in plain)
        different = [key for key, tensor in plain.items() if not torch.equal(tensor, overlap[key])]
        assert not different


def _tensors(rank: int, world_size: int, directory: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_plain_tensors(directory).items() if torch.is_tensor(value)}


WRITERS = {"common.pt": (TorchCommonSaveStrategy, "save_common"), ".metadata": (FileSystemWriterAsync, "finish")}


@pytest.mark.parametrize("file", WRITERS)
def test_full_disk_on_rank_0_ends_all_ranks(tmp_path: Path, file: str) -> None:
    """Only rank 0 writes these files, between collectives."""
    corpus = make_corpus(tmp_path / "corpus", 1)
    argv = command(corpus, tmp_path / "run", dp=2, train_iters=1, eval_iters=0)
    results = run_ranks(_main_on_full_disk, 2, argv, file, initialize=False)
    assert [code for code, _ in results] == [2, 2]
    assert "--save" in results[0][1] and "No space left on device" in results[0][1]
    assert not (tmp_path / "run" / "iter_0000001").exists()


def _main_on_full_disk(rank: int, world_size: int, argv: list[str], file: str) -> tuple[int, str]:
    def full(*_: Any, **__: Any) -> None:
        if rank == 0:
            raise OSError(28, "No space left on device")

    errors = io.StringIO()
    broken = mock.patch.object(*WRITERS[file], full)
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), broken:
        code = main(argv)
    return code, errors.getvalue()
