"""Saved weights are those of the last update, whichever collectives overlap with computation."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.serialization import load_plain_tensors
from ranks import run_ranks
from tiny import command, launch, make_corpus

OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def test_overlapped_gathering_saves_the_updated_weights(tmp_path: Path) -> None:
    """Without an evaluation before the save, which would gather the parameters too."""
    corpus = make_corpus(tmp_path / "corpus", 1)
    folders = {"overlap": OVERLAP, "plain": OVERLAP[:1]}
    for name, flags in folders.items():
        argv = command(corpus, tmp_path / name, dp=2, train_iters=3, save_interval=2, eval_iters=0)
        launch([*argv, *flags], 2)
    for step in (2, 3):
        overlap, plain = (run_ranks(_tensors, 1, str(tmp_path / name / f"iter_{step:07d}"))[0] for name in folders)
        assert overlap.keys() == plain.keys() and any("linear_qkv" in key for key in plain)
        different = [key for key, tensor in plain.items() if not torch.equal(tensor, overlap[key])]
        assert not different


def _tensors(rank: int, world_size: int, directory: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_plain_tensors(directory).items() if torch.is_tensor(value)}
