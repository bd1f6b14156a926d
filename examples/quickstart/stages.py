"""Shared stages of quickstart and comparison: data, tokenizer and training runs. Completed stages are reused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from corpora import build_corpora

from megatron_slm.config.paths import METRICS_FILE, STOP_FILE
from megatron_slm.runtime.console import format_duration
from megatron_slm.runtime.files import lock_output, write_text
from megatron_slm.runtime.metrics_file import read_records
from megatron_slm.runtime.output import print_error
from megatron_slm.runtime.reporting import INTERRUPTED, run_tool

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL = HERE / "model.yaml"
FOLDER = Path("runs/quickstart")  # relative to the repository root
CORPORA = ("clean_train", "clean_valid", "raw_train", "raw_valid")
LAST_LINES = 10  # of the log of a failed run


class StageFailed(Exception):
    """Raised if a command of a stage fails or is stopped, after the reason was printed; has its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def run_example(directory: Path, work: Callable[[], None]) -> int:
    """Call ``work``, which trains in ``directory``, and return the exit code.

    The directory is locked until then, since two processes would replace each other's runs.
    """

    def locked_work() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("ab") as lock:
            lock_output(lock, "the output directory")
            work()

    try:
        return run_tool(locked_work, "interrupted; the next start continues with the unfinished stages")
    except StageFailed as failure:
        return failure.code


def stage(
    name: str, directory: Path, settings: Sequence[str], work: Callable[[], None], inputs: Sequence[Path] = ()
) -> None:
    """Call ``work`` unless a mark file in ``directory`` records the same settings and inputs, under any interpreter.

    Args:
        name: stage name.
        directory: directory of the mark file.
        settings: arguments and file contents that determine the result.
        work: writes the result.
        inputs: marks of the stages whose results are read, and other files.

    Raises:
        StageFailed: a command failed, or a training run was stopped before its end.
    """
    path = mark(name, directory)
    portable = [setting for setting in settings if setting != sys.executable]
    content = json.dumps([*portable, *(_digest(each) for each in inputs)])
    if path.is_file() and path.read_text(encoding="utf-8") == content:
        print(f"== {name}: already complete", flush=True)
        return
    print(f"== {name}", flush=True)
    start = time.monotonic()
    path.unlink(missing_ok=True)  # an interruption may leave a part of the new result
    work()
    if (stopped := directory / STOP_FILE).is_file():  # by a signal, after which the trainer exits with code 0
        print_error(f"{name}: stopped before its end ({stopped.read_text(encoding='utf-8').strip()})")
        raise StageFailed(INTERRUPTED)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(path, content)
    print(f"== {name}: {format_duration(time.monotonic() - start)}", flush=True)


def mark(name: str, directory: Path) -> Path:
    """Return the mark file of a stage, which identifies its settings and inputs."""
    return directory / f".{name.replace(' ', '_')}.done"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"


def run(command: Sequence[str], **options: object) -> None:
    """Run a command of the project, and pass its output through.

    Raises:
        StageFailed: it ended with another exit code than 0.
    """
    code = subprocess.run(list(command), cwd=ROOT, check=False, **options).returncode  # type: ignore[call-overload]
    if code:
        raise StageFailed(code)


def prepare_data(directory: Path, vocab_size: int = 4096) -> None:
    """Prepare corpora, tokenizer and ``.bin/.idx`` files in ``directory``."""
    data = directory / "data"
    prepare_texts(data)
    texts = [str(data / f"{name}_train.jsonl") for name in ("clean", "raw")]
    tokenizer = [sys.executable, "tools/train_tokenizer.py", "--input", *texts, "--vocab-size", str(vocab_size)]
    tokenizer += ["--output-prefix", str(directory / "tokenizer")]
    texts_mark = mark("corpora", data)
    stage("tokenizer", data, tokenizer, lambda: run(tokenizer), [texts_mark])
    tokenize(data, tokenizer_flags(directory), CORPORA, [texts_mark, mark("tokenizer", data)])


def tokenizer_flags(directory: Path) -> list[str]:
    """Return the flags of the quickstart's tokenizer."""
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(directory / "tokenizer.model")]


def prepare_texts(data: Path) -> None:
    """Write the texts of all corpora to ``data``."""
    stage("corpora", data, [(HERE / "corpora.py").read_text(encoding="utf-8")], lambda: build_corpora(data))


def corpora_digest(directory: Path) -> str:
    """Return a digest of the texts, which are built from installed packages and so differ between machines."""
    digest = hashlib.sha256()
    for name in CORPORA:
        digest.update((directory / "data" / f"{name}.jsonl").read_bytes())
    return digest.hexdigest()[:12]


def tokenize(data: Path, tokenizer: Sequence[str], names: Sequence[str], inputs: Sequence[Path]) -> None:
    """Write the ``.bin/.idx`` files of corpora, given the marks of their texts and of the tokenizer."""
    for name in names:
        command = [sys.executable, "tools/preprocess_data.py", "--input", str(data / f"{name}.jsonl")]
        command += ["--output-prefix", str(data / name), *tokenizer, "--append-eod", "--workers", "2"]
        stage(f"tokenize {name}", data, command, lambda command=command: run(command), inputs)  # type: ignore[misc]


def corpus(directory: Path, name: str) -> str:
    """Return the prefix of a corpus of :func:`prepare_data`."""
    return str(directory / "data" / f"{name}_text_document")


def blend_arguments(directory: Path, blend: Sequence[str]) -> list[str]:
    """Return the arguments of ``--data-path`` for one corpus, or for weights and corpora in turn."""
    weights = () if len(blend) == 1 else blend[::2]
    paths = [corpus(directory, name) for name in blend_corpora(blend)]
    return [each for pair in zip(weights, paths, strict=True) for each in pair] if weights else paths


def blend_corpora(blend: Sequence[str]) -> Sequence[str]:
    """Return the names of the corpora of a blend."""
    return blend if len(blend) == 1 else blend[1::2]


def training_command(
    directory: Path, name: str, blend: Sequence[str], flags: Sequence[str], processes: int
) -> list[str]:
    """Return the command of one training run, saved in ``directory/name``."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [
        *launcher,
        *("-m", "megatron_slm.pretrain", "--config", str(MODEL)),
        *("--tokenizer-model", str(directory / "tokenizer.model"), "--data-path", *blend_arguments(directory, blend)),
        *("--valid-data-path", f"clean={corpus(directory, 'clean_valid')}", f"raw={corpus(directory, 'raw_valid')}"),
        *("--data-cache-path", str(directory / "cache"), "--save", str(directory / name)),
        "--slm-overwrite-save",  # replaces the run of a stage whose settings changed
        *flags,
    ]


def train(
    directory: Path, name: str, corpus_name: str, flags: Sequence[str], models: Sequence[str] = (), processes: int = 2
) -> None:
    """Train one run, unless it is already complete.

    Args:
        directory: of data and runs.
        name: of the run.
        corpus_name: corpus to train on.
        flags: further flags.
        models: runs whose checkpoints the flags load.
        processes: number of ranks.
    """
    command = training_command(directory, name, [corpus_name], flags, processes)
    settings = [*command, MODEL.read_text(encoding="utf-8")]
    work = partial(run, command, env=single_threaded())
    stage(f"train {name}", directory / name, settings, work, training_inputs(directory, [corpus_name], models))


def training_inputs(directory: Path, corpora: Sequence[str], models: Sequence[str]) -> list[Path]:
    """Return the marks of what a run reads: corpora, held-out texts, and the runs whose checkpoints it loads."""
    texts = dict.fromkeys((*corpora, "clean_valid", "raw_valid"))
    return [
        *(mark(f"tokenize {name}", directory / "data") for name in texts),
        *(mark(f"train {name}", directory / name) for name in models),
    ]


def run_with_log(command: Sequence[str], log: Path) -> None:
    """Run a command on one thread, with its output in a log file; if it fails, print the last lines.

    Raises:
        StageFailed: it ended with another exit code than 0.
    """
    with log.open("w", encoding="utf-8") as file:
        try:
            run(command, env=single_threaded(), stdout=file, stderr=file)
        except StageFailed as failure:
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            print_error("\n".join([f"exit code {failure.code}; the log {log} ends with:", *last]))
            raise


def single_threaded() -> dict[str, str]:
    """Return an environment with one thread per process, since the processes share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def read_metrics(directory: Path, kind: str) -> list[dict[str, Any]]:
    """Return the metrics records of one kind of a run."""
    return [record for record in read_records(directory / METRICS_FILE) if record["kind"] == kind]


def held_out_losses(directory: Path, held_out: str) -> tuple[list[int], list[float]]:
    """Return the tokens and losses of one run on one held-out set."""
    records = [record for record in read_metrics(directory, "eval") if record["set"] == held_out]
    return [record["tokens"] for record in records], [record["loss"] for record in records]
