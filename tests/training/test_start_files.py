"""Test the files opened by each rank: one rank validates, others open only the files that they read."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_slm.cli import pretrain, score_corpus
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, make_corpus

Opens = dict[str, int]  # by path relative to the watched directory


def _count_opens(
    rank: int, world_size: int, main: Callable[[list[str]], int], argv: list[str], directory: str
) -> Opens:
    """Run a command; return the open count of each file below ``directory``."""
    opens: Counter[str] = Counter()

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = os.path.abspath(arguments[0])  # noqa: PTH100
            if path.startswith(directory):
                opens[os.path.relpath(path, directory)] += 1

    sys.addaudithook(count)
    assert main(argv) == 0
    return dict(opens)


def _opens(main: Callable[[list[str]], int], argv: list[str], directory: Path) -> list[Opens]:
    return run_ranks(_count_opens, 2, main, argv, str(directory), initialize=False)


def _select(opens: Opens, text: str) -> Opens:
    return {name: count for name, count in opens.items() if text in name}


def test_one_rank_checks_the_start_files(tmp_path: Path) -> None:
    """Rank 1 of a scoring job and of a resumed SLM run maps its files once, and opens none for validation only."""
    train, valid = make_corpus(tmp_path / "train", 1), make_corpus(tmp_path / "valid", 2)
    launch(command(train, tmp_path / "base", train_iters=2))
    arguments = ["--reference-load", str(tmp_path / "base"), "--data-path", train, "--reference-scores", "rm"]
    first, second = _opens(score_corpus.main, [*arguments, "--no-slm-verify-checksums"], tmp_path)
    assert _select(second, "_text_document.") == {
        "train_text_document.bin": 1,
        "train_text_document.idx": 4,  # the header and three arrays
        "train_text_document.rm.scores.partial": 1,
    }
    _check_checkpoint(first, second)

    flags: dict[str, Any] = {"objective": "slm", "reference_scores": "rm", "override_opt_param_scheduler": True}
    argv = [
        f"held-out={valid}" if word.startswith("own=") else word
        for word in command(train, tmp_path / "slm", dp=2, load=tmp_path / "base", train_iters=3, **flags)
    ]
    first, second = _opens(pretrain.main, [*argv, "--no-slm-verify-checksums"], tmp_path)
    assert _select(second, "_text_document.") == {
        "train_text_document.bin": 1,
        "train_text_document.idx": 2,  # Megatron-Core reads the header, then maps the file
        "train_text_document.rm.scores": 1,
        "valid_text_document.bin": 1,
        "valid_text_document.idx": 2,
    }
    assert {f"{name}_text_document.corpus.json" for name in ("train", "valid")} <= first.keys()
    _check_checkpoint(first, second)


def _check_checkpoint(first: Opens, second: Opens) -> None:
    """Rank 1 opens only its shards and the files that Megatron-Core reads on every rank."""
    step = "base/iter_0000002"
    others = {name for name in _select(second, "base/") if not name.endswith(".distcp")}
    assert others == {f"{step}/{name}" for name in (".metadata", "metadata.json", "common.pt")}
    assert {f"{step}/manifest.json", f"{step}/config.yaml"} <= first.keys()
