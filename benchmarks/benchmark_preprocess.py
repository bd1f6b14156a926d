"""Compare the preprocessing speed with Megatron-LM's preprocess_data.py and preprocess_data_fast.py.

All tools use the same corpus, tokenizer and flags. Runs are interleaved, and medians include start-up. A tokenizer
without a file is trained once with 32,000 entries, and kept with the corpora in ``--work``. Unknown flags are passed to
all tools.

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
from baselines.corpora import natural_texts, resample_documents, shuffled, source_texts, unique, write_jsonl

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

ENTRIES, TRAINING_BYTES = 32_000, 30_000_000  # of a tokenizer trained by this benchmark
TOOL = Path(__file__).parents[1] / "tools" / "preprocess_data.py"


@dataclass(frozen=True)
class Corpus:
    """Represent a file of JSON lines with the key ``text``."""

    path: Path
    documents: int
    text_bytes: int


@dataclass
class Result:
    """Hold the seconds of start-up and of each repeat (including start-up), and rates of the median."""

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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="a corpus of JSON lines with the key text")
    source.add_argument("--corpus", choices=("natural", "source"), help="unique documents from the installation")
    add("--roots", type=Path, nargs="+", default=default_roots(), help="directories with text [this environment]")
    add("--draw-megabytes", type=int, help="resample new documents from the corpus' paragraphs up to this size")
    add("--megabytes", type=int, help="maximum text of the corpus")
    add("--work", type=Path, required=True, help="directory for corpora and outputs; existing corpora are reused")
    add("--workers", type=int, default=1, help="workers of every tool that supports them [1]")
    add("--repeats", type=int, default=3, help="interleaved repeats of every tool [3]")
    add("--megatron-lm", type=Path, help="a checkout of Megatron-LM")
    add("--megatron-python", default=sys.executable, help="Python interpreter that can run it [this one]")
    add("--fast-only", action="store_true", help="omit preprocess_data.py if preprocess_data_fast.py runs")
    add("--output", type=Path, help="JSON file for the result")
    add_tokenizer_flags(parser, required=True)
    return parser.parse_known_args()


def default_roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths["purelib"]), Path(paths["stdlib"]), Path("/usr/share/doc")]


def tokenizer_files(arguments: argparse.Namespace) -> TokenizerFiles:
    return TokenizerFiles.from_config(config_from_tokenizer_flags(arguments))


def make_corpus(arguments: argparse.Namespace) -> Corpus:
    """Return the corpus of the flags: given, existing, or created."""
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
        write_jsonl(unfinished, resample_documents(texts, drawn * 10**6) if drawn else texts, most and most * 10**6)
        unfinished.replace(path)
    return counted(path)


def read_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def counted(path: Path) -> Corpus:
    documents = size = 0
    for text in read_texts(path):
        documents += 1
        size += len(text.encode("utf-8"))
    return Corpus(path, documents, size)


def trained_tokenizer(corpus: Corpus, arguments: argparse.Namespace) -> Path:
    """Return the tokenizer of an earlier run in --work, or train one with 32,000 entries on the first documents."""
    kind = arguments.tokenizer_type
    path = arguments.work / ("huggingface" if kind == "HuggingFaceTokenizer" else "sentencepiece.model")
    if kind not in ("HuggingFaceTokenizer", "SentencePieceTokenizer"):
        raise ConfigError(
            f"--tokenizer-type {kind}: specify its files; only Hugging Face and SentencePiece tokenizers are trained."
        )
    if not path.exists():
        print(f"training {path}: a minute or two", file=sys.stderr)
        sample = arguments.work / "sample.jsonl"
        write_jsonl(sample, read_texts(corpus.path), TRAINING_BYTES)
        if kind == "HuggingFaceTokenizer":
            train_huggingface(read_texts(sample), path)
        else:
            train_tokenizer(TokenizerJob([str(sample)], str(path.with_suffix("")), ENTRIES))
    return path


def train_huggingface(texts: Iterator[str], directory: Path) -> None:
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
    partial = directory.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    model.save(str(partial / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (partial / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    partial.rename(directory)


def tool_commands(arguments: argparse.Namespace, flags: list[str]) -> dict[str, list[str]]:
    """Return the command of each tool, without input and output."""
    shared, workers = list(flags), ["--workers", str(arguments.workers)]
    for name, value in given_tokenizer_settings(arguments).items():
        shared += [f"--{name.replace('_', '-')}", str(value)]
    is_huggingface = arguments.tokenizer_type == "HuggingFaceTokenizer"
    as_megatron = ["--special-tokens-in-text", "tokens"] if is_huggingface else []
    commands = {"ours": [sys.executable, str(TOOL), *shared, *workers, *as_megatron]}
    if arguments.megatron_lm is not None:
        tools = arguments.megatron_lm.resolve() / "tools"
        if is_huggingface:  # the only supported type
            fast = [arguments.megatron_python, str(tools / "preprocess_data_fast.py"), "--use-gigatoken"]
            commands["preprocess_data_fast"] = [*fast, *shared]
        if not (is_huggingface and arguments.fast_only):
            slow = [arguments.megatron_python, str(tools / "preprocess_data.py")]
            commands["preprocess_data"] = [*slow, *shared, *workers]
    return commands


def measure(corpus: Corpus, arguments: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Time every tool in ``--repeats`` interleaved runs, and its start-up with one document."""
    one = arguments.work / "one.jsonl"
    write_jsonl(one, ["One document."])
    commands = tool_commands(arguments, flags)

    def run(name: str, source: Path, prefix: str) -> float:
        output = arguments.work / f"{name}-{prefix}"
        # import the checkout instead of an installed megatron-core
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
    """Run a command, and return its seconds.

    Raises:
        ConfigError: the command failed.
    """
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return time.monotonic() - began


def compared(corpus: Corpus, results: dict[str, Result], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return rates, ratios, and the comparison of the output files."""
    metadata = json.loads(next(arguments.work.glob("ours-out_*.corpus.json")).read_text(encoding="utf-8"))
    for result in results.values():
        result.rate(corpus, metadata["tokens"])
    medians = {name: statistics.median(result.seconds) for name, result in results.items()}
    digests = {name: output_digests(arguments.work, name) for name in results}
    others = [name for name in results if name != "ours"]
    return {
        "corpus": {"name": corpus.path.stem, "documents": corpus.documents, "text_bytes": corpus.text_bytes},
        "tokens": metadata["tokens"],
        "workers": arguments.workers,
        "results": {name: asdict(result) for name, result in results.items()},
        "times": {name: medians[name] / medians["ours"] for name in others},
        "equal": all(digests[name] == digests["ours"] for name in others) if others else None,
    }


def output_digests(work: Path, name: str) -> list[str]:
    """Return the sha256 of a tool's .bin and .idx files."""
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
