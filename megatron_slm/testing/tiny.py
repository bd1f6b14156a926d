"""A tiny corpus, model and command line, on which the trainer's tests run whole jobs in seconds."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

from megatron_slm.cli.pretrain import main
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.tokenizers.tokenizer import TokenizerFiles

MODEL = [
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--group-query-attention", "--num-query-groups", "4", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--tokenizer-type", "ByteTokenizer", "--lr", "1e-2"),
    *("--num-workers", "0", "--eval-iters", "1"),
    *("--slm-saved-logits-mb", "0"),  # as with a model of any size
]
BATCH = 8  # samples of one micro-batch step over all data-parallel ranks
GLOBAL_BATCH = 16


def make_corpus(prefix: Path, seed: int, documents: int = 60) -> str:
    """A corpus of pseudo-words; the prefix of its .bin and .idx."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefgh ", k=chance.randint(2, 6))) for _ in range(30)]
    text = prefix.with_suffix(".jsonl")
    lines = [json.dumps({"text": " ".join(chance.choices(words, k=40))}) for _ in range(documents)]
    text.write_text("\n".join(lines), encoding="utf-8")
    job = Job([str(text)], ["text"], str(prefix), "ByteTokenizer", TokenizerFiles(), append_eod=True)
    preprocess(job)
    return job.prefix("text")


def command(corpus: str, save: Path | None = None, *, dp: int = 1, model: list[str] = MODEL, **flags: Any) -> list[str]:
    """The command line of a tiny run; keyword arguments are further flags (True: a switch)."""
    words = [*model, "--data-path", corpus, "--split", "100,0,0", "--valid-data-path", f"own={corpus}"]
    words += ["--micro-batch-size", str(BATCH // dp), "--global-batch-size", str(GLOBAL_BATCH)]
    if save is not None:
        words += ["--save", str(save)]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def launch(argv: list[str], world_size: int = 1) -> None:
    """Run the trainer on ``world_size`` ranks; every one must end well."""
    for code, errors in run_ranks(_main, world_size, argv, initialise=False):
        assert code == 0, errors


def launch_each(commands: list[list[str]]) -> None:
    """Run the trainer several times in one process, which is faster: some costs are paid once."""
    run_ranks(_main_each, 1, commands, initialise=False)


def launch_and_fail(argv: list[str], world_size: int = 1) -> tuple[int, str]:
    """Run the trainer; exit code and standard error of rank 0."""
    return run_ranks(_main, world_size, argv, initialise=False)[0]


def _main(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    return code, errors.getvalue()


def _main_each(rank: int, world_size: int, commands: list[list[str]]) -> None:
    for argv in commands:
        code, errors = _main(rank, world_size, argv)
        assert code == 0, errors


def records(save: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What the run in ``save`` wrote to its JSONL file."""
    lines = (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


LOSSES = ("loss", "loss_all", "loss_unselected", "share_selected", "threshold", "selection", "grad_norm", "lr")


def losses(save: Path) -> list[tuple[Any, ...]]:
    """The figures of every step that must not depend on time."""
    return [tuple(record[name] for name in LOSSES) for record in records(save)]
