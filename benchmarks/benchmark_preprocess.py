"""Preprocessing speed side by side: this tool, and Megatron-LM's preprocess_data.py and preprocess_data_fast.py.

All take the same corpus, tokenizer and flags; runs are interleaved, and medians are shown, start-up included. A
tokenizer without a file is trained once, with 32,000 entries, and kept with the corpora in ``--work``. Flags that are
not known here go to all tools.

    python benchmarks/benchmark_preprocess.py --corpus source --draw-megabytes 300 --work bench --workers 2 \\
        --append-eod --tokenizer-type HuggingFaceTokenizer --megatron-lm DIR --megatron-python EXE --fast-only
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from baselines.corpora import drawn_anew, natural_texts, shuffled, source_texts, unique, write_jsonl

from megatron_slm.config.tokenizer_flags import (
    add_tokenizer_flags,
    config_from_tokenizer_flags,
    given_tokenizer_settings,
)
from megatron_slm.preprocessing.engines import build_engine
from megatron_slm.preprocessing.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer

ENTRIES, TRAINING_BYTES = 32_000, 30_000_000  # of a tokenizer that is trained here
TOOL = Path(__file__).parent / "preprocess_data.py"


@dataclass(frozen=True)
class Corpus:
    """A file of JSON lines with the key ``text``."""

    path: Path
    documents: int
    text_bytes: int


@dataclass
class Result:
    """Seconds of the start-up and of each repeat, start-up included, and the rates of their median."""

    start_up: float
    seconds: list[float]
    documents_per_second: float = 0.0
    megabytes_per_second: float = 0.0
    tokens_per_second: float = 0.0

    def rate(self, corpus: Corpus, tokens: int) -> None:
        median = statistics.median(self.seconds)
        self.documents_per_second = corpus.documents / median
        self.megabytes_per_second = corpus.text_bytes / median / 1e6
        self.tokens_per_second = tokens / median


def main() -> int:
    arguments, flags = parse_arguments()
    try:
        arguments.work.mkdir(parents=True, exist_ok=True)
        corpus = make_corpus(arguments)
        if not given_tokenizer_settings(arguments).keys() & {"tokenizer_model", "vocab_file", "vocab_size"}:
            arguments.tokenizer_model = str(trained_tokenizer(corpus, arguments))
        tokenizer = build_tokenizer(arguments.tokenizer_type, tokenizer_files(arguments))
        report = measure(corpus, arguments, flags)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    engine, reason = build_engine(tokenizer, np.dtype(np.int32))
    report |= {"engine": engine.name, "reason": reason, "flags": sys.argv[1:], "cpus": os.cpu_count()}
    report |= {"python": platform.python_version(), "machine": platform.machine()}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    return 0 if report["equal"] is not False else 1


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", type=Path, help="a corpus of JSON lines with the key text")
    what.add_argument("--corpus", choices=("natural", "source"), help="made of what is installed, each document once")
    add("--roots", type=Path, nargs="+", default=default_roots(), help="where text is looked for [this environment]")
    add("--draw-megabytes", type=int, help="draw new documents from the corpus' paragraphs up to this size")
    add("--megabytes", type=int, help="use no more than this much text of the corpus")
    add("--work", type=Path, required=True, help="folder for corpora and outputs; corpora in it are used again")
    add("--workers", type=int, default=1, help="of every tool that takes them [1]")
    add("--repeats", type=int, default=3, help="of every tool, interleaved [3]")
    add("--megatron-lm", type=Path, help="a checkout of Megatron-LM")
    add("--megatron-python", default=sys.executable, help="a Python that can run it [this one]")
    add("--fast-only", action="store_true", help="leave out preprocess_data.py beside preprocess_data_fast.py")
    add("--output", type=Path, help="JSON file for the result")
    add_tokenizer_flags(parser, required=True)
    return parser.parse_known_args()


def default_roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths["purelib"]), Path(paths["stdlib"]), Path("/usr/share/doc")]


def tokenizer_files(arguments: argparse.Namespace) -> TokenizerFiles:
    return TokenizerFiles.of(config_from_tokenizer_flags(arguments))


def make_corpus(arguments: argparse.Namespace) -> Corpus:
    """The corpus of the flags: given, made, or made by a run before."""
    if arguments.input is not None:
        if not arguments.input.is_file():
            raise ConfigError(f"--input {arguments.input}: there is no such file.")
        return counted(arguments.input)
    drawn, most = arguments.draw_megabytes, arguments.megabytes
    name = arguments.corpus + (f"-drawn-{drawn}" if drawn else "") + (f"-first-{most}" if most else "")
    path = arguments.work / f"{name}.jsonl"
    if not path.is_file():
        print(f"making {path}: some minutes", file=sys.stderr)
        find = natural_texts if arguments.corpus == "natural" else source_texts
        texts = shuffled(unique(find(arguments.roots)))
        if not texts:
            raise ConfigError(f"--roots {' '.join(map(str, arguments.roots))} hold no text.")
        unfinished = path.with_suffix(".partial")
        write_jsonl(unfinished, drawn_anew(texts, drawn * 10**6) if drawn else texts, most and most * 10**6)
        unfinished.replace(path)
    return counted(path)


def texts_of(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def counted(path: Path) -> Corpus:
    documents = size = 0
    for text in texts_of(path):
        documents += 1
        size += len(text.encode("utf-8"))
    return Corpus(path, documents, size)


def trained_tokenizer(corpus: Corpus, arguments: argparse.Namespace) -> Path:
    """Return the tokenizer of an earlier run in the folder, or train one of 32,000 entries on the corpus' beginning."""
    kind = arguments.tokenizer_type
    path = arguments.work / ("huggingface" if kind == "HuggingFaceTokenizer" else "sentencepiece.model")
    if kind not in ("HuggingFaceTokenizer", "SentencePieceTokenizer"):
        raise ConfigError(f"--tokenizer-type {kind}: give its files; others are trained if they have none.")
    if not path.exists():
        print(f"training {path}: a minute or two", file=sys.stderr)
        sample = arguments.work / "sample.jsonl"
        write_jsonl(sample, texts_of(corpus.path), TRAINING_BYTES)
        if kind == "HuggingFaceTokenizer":
            train_huggingface(texts_of(sample), path)
        else:
            train_tokenizer(TokenizerJob([str(sample)], str(path.with_suffix("")), ENTRIES))
    return path


def train_huggingface(texts: Iterator[str], folder: Path) -> None:
    """Train a byte-level BPE tokenizer with GPT-2's expression."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    partial = folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    model.save(str(partial / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (partial / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    partial.rename(folder)


def commands_of(arguments: argparse.Namespace, flags: list[str]) -> dict[str, list[str]]:
    """Return the command of each tool, without input and output."""
    shared, workers = list(flags), ["--workers", str(arguments.workers)]
    for name, value in given_tokenizer_settings(arguments).items():
        shared += [f"--{name.replace('_', '-')}", str(value)]
    is_huggingface = arguments.tokenizer_type == "HuggingFaceTokenizer"
    as_megatron = ["--special-tokens-in-text", "tokens"] if is_huggingface else []
    commands = {"ours": [sys.executable, str(TOOL), *shared, *workers, *as_megatron]}
    if arguments.megatron_lm is not None:
        tools = arguments.megatron_lm.resolve() / "tools"
        if is_huggingface:  # the only kind that it reads
            fast = [arguments.megatron_python, str(tools / "preprocess_data_fast.py"), "--use-gigatoken"]
            commands["preprocess_data_fast"] = [*fast, *shared]
        if not (is_huggingface and arguments.fast_only):
            slow = [arguments.megatron_python, str(tools / "preprocess_data.py")]
            commands["preprocess_data"] = [*slow, *shared, *workers]
    return commands


def measure(corpus: Corpus, arguments: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Time every tool ``--repeats`` times, in turn, and its start-up: one document."""
    one = arguments.work / "one.jsonl"
    write_jsonl(one, ["One document."])
    commands = commands_of(arguments, flags)

    def run(name: str, source: Path, prefix: str) -> float:
        output = arguments.work / f"{name}-{prefix}"
        # the checkout before a megatron-core that may be installed
        home = {} if name == "ours" else {"PYTHONPATH": str(arguments.megatron_lm.resolve())}
        return timed([*commands[name], "--input", str(source), "--output-prefix", str(output)], home)

    results = {name: Result(run(name, one, "one"), []) for name in commands}
    with progress("measuring", arguments.repeats * len(commands), "runs") as bar:
        for _ in range(arguments.repeats):
            for name, result in results.items():
                result.seconds.append(run(name, corpus.path, "out"))
                bar.advance()
    return compared(corpus, results, arguments)


def timed(command: list[str], environment: dict[str, str]) -> float:
    """Return the seconds of a command, which must succeed."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return time.monotonic() - began


def compared(corpus: Corpus, results: dict[str, Result], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return rates, ratios, and whether the files are equal."""
    metadata = json.loads(next(arguments.work.glob("ours-out_*.corpus.json")).read_text(encoding="utf-8"))
    for result in results.values():
        result.rate(corpus, metadata["tokens"])
    medians = {name: statistics.median(result.seconds) for name, result in results.items()}
    digests = {name: digests_of(arguments.work, name) for name in results}
    others = [name for name in results if name != "ours"]
    return {
        "corpus": {"name": corpus.path.stem, "documents": corpus.documents, "text_bytes": corpus.text_bytes},
        "tokens": metadata["tokens"],
        "workers": arguments.workers,
        "results": {name: asdict(result) for name, result in results.items()},
        "times": {name: medians[name] / medians["ours"] for name in others},
        "equal": all(digests[name] == digests["ours"] for name in others) if others else None,
    }


def digests_of(work: Path, name: str) -> list[str]:
    """Return the sha256 of the .bin and .idx files that a tool wrote."""
    digests = []
    for path in sorted(work.glob(f"{name}-out_*.[bi][id][nx]")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def show(report: dict[str, Any]) -> None:
    corpus = report["corpus"]
    print(
        f"{corpus['name']}: {corpus['documents']:,} documents, {corpus['text_bytes'] / 1e6:,.0f} MB of text, "
        f"{report['tokens']:,} tokens, {report['workers']} workers; engine: {report['engine']}"
    )
    print(f"{'':20} {'seconds':>8} {'start-up':>9} {'MB/s':>8} {'documents/s':>12} {'times slower':>13}")
    for name, result in report["results"].items():
        times = report["times"].get(name)
        print(
            f"{name:20} {statistics.median(result['seconds']):8.1f} {result['start_up']:8.1f}s "
            f"{result['megabytes_per_second']:8.2f} {result['documents_per_second']:12,.0f} "
            f"{'' if times is None else format(times, '.2f'):>13}"
        )
    if report["equal"] is not None:
        print(f".bin and .idx are {'byte-equal' if report['equal'] else 'DIFFERENT: the comparison is void'}")


if __name__ == "__main__":
    sys.exit(main())
