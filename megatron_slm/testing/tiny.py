"""Tiny corpora, models and command lines, with which complete training jobs run in seconds."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_slm.cli.pretrain import main
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.testing.ranks import run_ranks, shared_process_group
from megatron_slm.tokenizers.tokenizer import TokenizerFiles

MODEL = [
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--group-query-attention", "--num-query-groups", "4", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--tokenizer-type", "ByteTokenizer", "--lr", "1e-2"),
    *("--num-workers", "0", "--eval-iters", "1"),
    *("--slm-saved-logits-mb", "0"),  # as for large models
]
Main = Callable[[list[str]], int]  # main function of a command
BATCH = 8  # samples of a micro-batch over all data-parallel ranks
GLOBAL_BATCH = 16


def make_corpus(prefix: Path, seed: int, documents: int = 60) -> str:
    """Create a corpus of random words; return its prefix."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh ", k=rng.randint(2, 6))) for _ in range(30)]
    text = prefix.with_suffix(".jsonl")
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=40))}) for _ in range(documents)]
    text.write_text("\n".join(lines), encoding="utf-8")
    job = Job([str(text)], ["text"], str(prefix), "ByteTokenizer", TokenizerFiles(), append_eod=True)
    preprocess(job)
    return job.prefix("text")


def command(
    corpus: str,
    save: Path | None = None,
    *,
    dp: int = 1,
    model: list[str] = MODEL,
    losses_only: bool = False,
    **flags: Any,
) -> list[str]:
    """Return the command line of a tiny run.

    Args:
        save: directory of checkpoints and metrics.
        losses_only: write no checkpoint to ``save``, and evaluate only if ``flags`` has eval_iters.
        flags: additional flags (True for switches).
    """
    argv = [*model, "--data-path", corpus, "--split", "100,0,0", "--valid-data-path", f"own={corpus}"]
    argv += ["--micro-batch-size", str(BATCH // dp), "--global-batch-size", str(GLOBAL_BATCH)]
    argv += ["--eval-iters", "0"] if losses_only else []
    if save is not None:
        argv += ["--slm-metrics-file", str(save / "metrics.jsonl")] if losses_only else ["--save", str(save)]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    return argv


def launch(argv: list[str], world_size: int = 1) -> None:
    """Run the trainer on ``world_size`` ranks, and assert exit code 0 on each."""
    for code, errors in run_ranks(_main, world_size, argv, initialize=False):
        assert code == 0, errors


class Outcome(NamedTuple):
    """Exit code and output of one run of the trainer."""

    code: int
    output: str
    errors: str


def run_each(*commands: list[str], main: Main = main, ranks: int = 1) -> list[Outcome]:
    """Run a command, by default the trainer, once per command line in the same processes, which saves start-up time.

    Returns:
        the outcomes on rank 0.
    """
    return run_ranks(_main_each, ranks, commands, main, initialize=False)[0]


def launch_each(commands: list[list[str]]) -> None:
    """Run the trainer once per command line in one process, and assert exit code 0 of each run."""
    for outcome in run_each(*commands):
        assert outcome.code == 0, outcome.errors


def launch_and_fail(argv: list[str], world_size: int = 1) -> tuple[int, str]:
    """Run the trainer; return exit code and standard error of rank 0."""
    return run_ranks(_main, world_size, argv, initialize=False)[0]


def captured(argv: list[str], main: Main = main) -> Outcome:
    """Run a command in this process, and return its exit code and output."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(argv)
    return Outcome(code, output.getvalue(), errors.getvalue())


def _main(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    outcome = captured(argv)
    return outcome.code, outcome.errors


def _main_each(rank: int, world_size: int, commands: tuple[list[str], ...], main: Main) -> list[Outcome]:
    with shared_process_group() if world_size > 1 else contextlib.nullcontext():
        return [captured(argv, main) for argv in commands]


def records(save: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the records of one kind in the metrics file of a run."""
    lines = (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


LOSSES = ("loss", "loss_all", "loss_unselected", "share_selected", "threshold", "selection", "grad_norm", "lr")


def losses(save: Path) -> list[tuple[Any, ...]]:
    """Return the time-independent metrics of every step."""
    return [tuple(record[name] for name in LOSSES) for record in records(save)]
