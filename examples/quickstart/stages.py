"""The stages that quickstart and comparison share: data, tokenizer, training runs; what is done is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from corpora import build_corpora

from megatron_slm.runtime.console import format_duration
from megatron_slm.runtime.files import write_text

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL = HERE / "model.yaml"
FOLDER = Path("runs/quickstart")  # below the repository, where all commands run
BASE_STEPS, REFERENCE_STEPS = 100, 100
CORPORA = ("clean_train", "clean_valid", "raw_train", "raw_valid")


class StageFailed(Exception):
    """A command of a stage failed; it has said why. Holds its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def stage(name: str, folder: Path, settings: Sequence[str], work: Callable[[], None]) -> None:
    """Do ``work`` unless it was done before with the same settings; a mark in ``folder`` remembers."""
    mark = folder / f".{name.replace(' ', '_')}.done"
    wanted = json.dumps(list(settings))
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted:
        print(f"== {name}: done before, kept", flush=True)
        return
    print(f"== {name}", flush=True)
    began = time.monotonic()
    work()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(mark, wanted)
    print(f"== {name}: {format_duration(time.monotonic() - began)}", flush=True)


def run(command: Sequence[str], **options: object) -> None:
    """Run a command of the project; its output is the user's to read.

    Raises:
        StageFailed: it ended with another exit code than 0.
    """
    code = subprocess.run(list(command), cwd=ROOT, check=False, **options).returncode  # type: ignore[call-overload]
    if code:
        raise StageFailed(code)


def prepare_data(folder: Path, vocab_size: int = 4096) -> None:
    """Corpora, tokenizer and ``.bin/.idx`` files below ``folder``."""
    data = folder / "data"
    texts = [str(data / f"{name}_train.jsonl") for name in ("clean", "raw")]
    stage("corpora", data, [(HERE / "corpora.py").read_text(encoding="utf-8")], lambda: build_corpora(data))
    tokenizer = [sys.executable, "tools/train_tokenizer.py", "--input", *texts, "--vocab-size", str(vocab_size)]
    tokenizer += ["--output-prefix", str(folder / "tokenizer")]
    stage("tokenizer", data, tokenizer, lambda: run(tokenizer))
    for name in CORPORA:
        command = [sys.executable, "tools/preprocess_data.py", "--input", str(data / f"{name}.jsonl")]
        command += ["--output-prefix", str(data / name), "--tokenizer-type", "SentencePieceTokenizer"]
        command += ["--tokenizer-model", str(folder / "tokenizer.model"), "--append-eod", "--workers", "2"]
        stage(f"tokenize {name}", data, command, lambda command=command: run(command))  # type: ignore[misc]


def prepare_base_and_reference(folder: Path) -> list[str]:
    """Data, the base model (CLM on raw), from it the reference model (CLM on clean); flags that begin from the base."""
    prepare_data(folder)
    load_base = ["--load", str(folder / "base"), "--finetune"]
    train(folder, "base", "raw_train", ["--train-iters", str(BASE_STEPS)])
    train(folder, "rm", "clean_train", ["--train-iters", str(REFERENCE_STEPS), *load_base])
    return load_base


def corpus(folder: Path, name: str) -> str:
    """The prefix of a corpus that :func:`prepare_data` made."""
    return str(folder / "data" / f"{name}_text_document")


def training_command(folder: Path, name: str, corpus_name: str, flags: Sequence[str], processes: int) -> list[str]:
    """The command of one training run, saved in ``folder/name``."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [
        *launcher,
        *("-m", "megatron_slm.pretrain", "--config", str(MODEL)),
        *("--tokenizer-model", str(folder / "tokenizer.model"), "--data-path", corpus(folder, corpus_name)),
        *("--valid-data-path", f"clean={corpus(folder, 'clean_valid')}", f"raw={corpus(folder, 'raw_valid')}"),
        *("--data-cache-path", str(folder / "cache"), "--save", str(folder / name)),
        "--slm-overwrite-save",  # a stage with other settings replaces the earlier one
        *flags,
    ]


def train(folder: Path, name: str, corpus_name: str, flags: Sequence[str], processes: int = 2) -> None:
    """One training run, unless it was done before."""
    command = training_command(folder, name, corpus_name, flags, processes)
    settings = [*command[1:], MODEL.read_text(encoding="utf-8")]
    stage(f"train {name}", folder / name, settings, lambda: run(command, env=single_threaded()))


def run_with_log(command: Sequence[str], log: Path) -> None:
    """Run a command on one thread; its lines go to a file.

    Raises:
        StageFailed: it ended with another exit code than 0.
    """
    with log.open("w", encoding="utf-8") as file:
        run(command, env=single_threaded(), stdout=file, stderr=file)


def single_threaded() -> dict[str, str]:
    """An environment in which every process computes on one thread, since the processes share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def read_metrics(folder: Path, kind: str) -> list[dict[str, object]]:
    """The records of one kind that a run wrote."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def held_out_losses(folder: Path, held_out: str) -> tuple[list[int], list[float]]:
    """Tokens and losses of one run on one held-out set."""
    records = [record for record in read_metrics(folder, "eval") if record["set"] == held_out]
    return [int(str(record["tokens"])) for record in records], [float(str(record["loss"])) for record in records]
