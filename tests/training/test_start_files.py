"""Files that each rank of a run opens: one rank checks, and the others open only the files that they read from."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import score_corpus
from ranks import run_ranks
from tiny import command, launch, make_corpus

from megatron_slm.pretrain import main


def _count_opens(rank: int, world_size: int, argv: list[str], directory: str) -> dict[str, int]:
    """Run the trainer; return the opens of each file below ``directory``."""
    opens: Counter[str] = Counter()

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = os.path.abspath(arguments[0])  # noqa: PTH100
            if path.startswith(directory):
                opens[os.path.relpath(path, directory)] += 1

    sys.addaudithook(count)
    assert main(argv) == 0
    return dict(opens)


def test_one_rank_checks_the_start_files(tmp_path: Path) -> None:
    """Rank 1 of a resumed SLM run maps its corpora and its sidecar once, and opens no file only to check it."""
    train, valid = make_corpus(tmp_path / "train", 1), make_corpus(tmp_path / "valid", 2)
    launch(command(train, tmp_path / "base", train_iters=2))
    words = ["--reference-load", str(tmp_path / "base"), "--data-path", train, "--reference-scores", "rm"]
    assert score_corpus.main(words) == 0
    flags = {"objective": "slm", "reference_scores": "rm", "train_iters": 3, "override_opt_param_scheduler": True}
    argv = [
        f"held-out={valid}" if word.startswith("own=") else word
        for word in command(train, tmp_path / "slm", dp=2, load=tmp_path / "base", **flags)
    ]
    first, second = run_ranks(_count_opens, 2, [*argv, "--no-slm-verify-checksums"], str(tmp_path), initialise=False)
    corpora = {name: count for name, count in second.items() if "_text_document." in name}
    assert corpora == {
        "train_text_document.bin": 1,
        "train_text_document.idx": 2,  # Megatron-Core reads the header, then maps the file
        "train_text_document.rm.scores": 1,
        "valid_text_document.bin": 1,
        "valid_text_document.idx": 2,
    }
    assert {f"{name}_text_document.corpus.json" for name in ("train", "valid")} <= first.keys()
