"""Preprocessing speed in one run: this tool, the plain tokenizer, and Megatron-LM's tool where it is at hand.

All take the same corpus, tokenizer, flags and number of workers; repeats are interleaved, and medians are shown. The
start-up of a tool (its time for one document) is taken off, which favours the slower starter. The tokenizer's own limit
is that of as many processes as workers that do nothing but encode. Flags that are not known here go to both tools, for
example --append-eod.

    python tools/benchmark_preprocess.py --corpus natural --work bench --workers 2 --tokenizer-type \\
        SentencePieceTokenizer --tokenizer-model tok.model --megatron-lm DIR --megatron-python EXE --output result.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.corpora import drawn_anew, natural_texts, shuffled, source_texts, unique, write_jsonl

from megatron_slm.config.tokenizer_flags import (
    add_tokenizer_flags,
    config_of_tokenizer_flags,
    given_tokenizer_settings,
)
from megatron_slm.data.preprocessing.engines import build_engine
from megatron_slm.data.tokenizers.tokenizer import TokenizerFiles, build_tokenizer
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.errors import ConfigError

TOOL = Path(__file__).parent / "preprocess_data.py"


@dataclass(frozen=True)
class Corpus:
    """A file of JSON lines with the key ``text``."""

    path: Path
    documents: int
    text_bytes: int


@dataclass
class Result:
    """Seconds of each repeat, without the start-up, and what follows from their median."""

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
        tokenizer = build_tokenizer(arguments.tokenizer_type, tokenizer_files(arguments))
        corpus = make_corpus(arguments)
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
    add("--draw-megabytes", type=int, help="draw new documents from the natural text's paragraphs up to this size")
    add("--megabytes", type=int, help="use no more than this much text of the corpus")
    add("--work", type=Path, required=True, help="folder for corpora and outputs; corpora in it are used again")
    add("--workers", type=int, default=1, help="of every contestant [1]")
    add("--repeats", type=int, default=3, help="of every contestant, interleaved [3]")
    add("--megatron-lm", type=Path, help="a checkout of Megatron-LM")
    add("--megatron-python", default=sys.executable, help="a Python that can run it [this one]")
    add("--output", type=Path, help="JSON file for the result")
    add_tokenizer_flags(parser, required=True)
    return parser.parse_known_args()


def default_roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths["purelib"]), Path(paths["stdlib"]), Path("/usr/share/doc")]


def tokenizer_files(arguments: argparse.Namespace) -> TokenizerFiles:
    return TokenizerFiles.of(config_of_tokenizer_flags(arguments))


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


def counted(path: Path) -> Corpus:
    documents = size = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            documents += 1
            size += len(json.loads(line)["text"].encode("utf-8"))
    return Corpus(path, documents, size)


def measure(corpus: Corpus, arguments: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Time every contestant ``--repeats`` times, in turn."""
    one = arguments.work / "one.jsonl"
    write_jsonl(one, ["One document."])
    commands = {"ours": [sys.executable, str(TOOL)]}
    if arguments.megatron_lm is not None:
        commands["megatron_lm"] = [arguments.megatron_python, str(arguments.megatron_lm / "tools/preprocess_data.py")]
    shared = ["--workers", str(arguments.workers), *flags]
    for name, value in given_tokenizer_settings(arguments).items():
        shared += [f"--{name.replace('_', '-')}", str(value)]

    def run(name: str, source: Path, prefix: str) -> float:
        output = arguments.work / f"{name}-{prefix}"
        # the checkout before a megatron-core that may be installed
        home = {"PYTHONPATH": str(arguments.megatron_lm.resolve())} if name == "megatron_lm" else {}
        return timed([*commands[name], "--input", str(source), "--output-prefix", str(output), *shared], home)

    contestants: dict[str, Callable[[], float]] = {name: partial(run, name, corpus.path, "out") for name in commands}
    contestants["tokenizer"] = partial(tokenizer_alone, corpus, arguments)
    results = {name: Result(run(name, one, "one") if name in commands else 0.0, []) for name in contestants}
    with progress("measuring", arguments.repeats * len(contestants), "runs") as bar:
        for _ in range(arguments.repeats):
            for name, contestant in contestants.items():
                results[name].seconds.append(max(contestant() - results[name].start_up, 1e-9))
                bar.advance()
    return compared(corpus, results, arguments)


def timed(command: list[str], environment: dict[str, str]) -> float:
    """Seconds of a command that must succeed."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return time.monotonic() - began


def tokenizer_alone(corpus: Corpus, arguments: argparse.Namespace) -> float:
    """Seconds that ``--workers`` processes need to encode all texts and do nothing else: those of the slowest."""
    kind, files, workers = arguments.tokenizer_type, tokenizer_files(arguments), arguments.workers
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        return max(pool.starmap(_encode_share, [(corpus.path, kind, files, i, workers) for i in range(workers)], 1))


def _encode_share(path: Path, kind: str, files: TokenizerFiles, place: int, workers: int) -> float:
    tokenizer = build_tokenizer(kind, files)
    seconds = 0.0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % workers == place:
                text = json.loads(line)["text"]
                began = time.perf_counter()
                tokenizer.encode(text)
                seconds += time.perf_counter() - began
    return seconds


def compared(corpus: Corpus, results: dict[str, Result], arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates, ratios, and whether the files are equal."""
    outputs = {name: sorted(arguments.work.glob(f"{name}-out_*.[bi][id][nx]")) for name in results}
    record = json.loads(next(arguments.work.glob("ours-out_*.json")).read_text(encoding="utf-8"))
    for result in results.values():
        result.rate(corpus, record["tokens"])
    medians = {name: statistics.median(result.seconds) for name, result in results.items()}
    equal = None
    if "megatron_lm" in results:
        equal = [*map(digest, outputs["ours"])] == [*map(digest, outputs["megatron_lm"])] and bool(outputs["ours"])
    return {
        "corpus": {"name": corpus.path.stem, "documents": corpus.documents, "text_bytes": corpus.text_bytes},
        "tokens": record["tokens"],
        "workers": arguments.workers,
        "results": {name: asdict(result) for name, result in results.items()},
        "times_megatron_lm": medians["megatron_lm"] / medians["ours"] if "megatron_lm" in medians else None,
        "share_of_tokenizer_limit": {
            name: medians["tokenizer"] / median for name, median in medians.items() if name != "tokenizer"
        },
        "equal": equal,
    }


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def show(report: dict[str, Any]) -> None:
    corpus = report["corpus"]
    print(
        f"{corpus['name']}: {corpus['documents']:,} documents, {corpus['text_bytes'] / 1e6:,.0f} MB of text, "
        f"{report['tokens']:,} tokens, {report['workers']} workers; {report['engine']}"
    )
    print(f"{'':12} {'documents/s':>12} {'MB/s':>8} {'tokens/s':>12} {'of the tokenizer':>17} {'start-up':>9}")
    for name, result in report["results"].items():
        share = report["share_of_tokenizer_limit"].get(name)
        print(
            f"{name:12} {result['documents_per_second']:12,.0f} {result['megabytes_per_second']:8.2f} "
            f"{result['tokens_per_second']:12,.0f} {'' if share is None else format(share, '.2f'):>17} "
            f"{result['start_up']:8.1f}s"
        )
    if report["times_megatron_lm"] is not None:
        same = "byte-equal" if report["equal"] else "DIFFERENT: the comparison is void"
        print(f"{report['times_megatron_lm']:.2f} times Megatron-LM's speed; .bin and .idx are {same}")


if __name__ == "__main__":
    sys.exit(main())
