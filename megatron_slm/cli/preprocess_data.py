"""Tokenize text into a .bin/.idx corpus; flags and output files are those of Megatron-LM.

Memory usage is independent of the input size: one tokenizer per worker, and at most 3 x workers blocks in flight, each
with 1 MiB of text (or one longer document) and its ids. Use --resume to continue a job that was killed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.tokenizer_flags import add_tokenizer_flags, config_from_tokenizer_flags
from megatron_slm.preprocessing.documents import find_inputs
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.preprocessing.reading_flags import add_json_keys, add_reading_flags
from megatron_slm.preprocessing.shards import parse_shard
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.output import print_error, print_summary
from megatron_slm.runtime.reporting import run_tool
from megatron_slm.tokenizers.base import TEXT, TOKENS, TokenizerFiles

SHARD = """process only shard i (from 0) of n shards of similar size, into the directory
<output-prefix>_<key>_document; tools/merge_datasets.py --input DIRECTORY merges all shards into the corpus that a
single job would have produced"""

MEASURE = "Use benchmarks/benchmark_preprocess.py to measure speed."
FROM_FILE = "The tokenizer's file defines this."
REFUSED = {  # unsupported flags of Megatron-LM's tool or of earlier versions -> remedy
    "--no-word-cache": "It was removed. Use --no-use-gigatoken to encode with the tokenizer's library only.",
    "--find-optimal-num-workers": MEASURE,
    "--workers-to-check": MEASURE,
    "--max-documents": MEASURE,
    "--padded-vocab-size": "Corpora depend on the exact vocabulary; the trainer pads it.",
    "--pad-vocab-size": "Corpora depend on the exact vocabulary; the trainer pads it.",
    "--no-pad-vocab-size": "Corpora depend on the exact vocabulary; the trainer pads it.",
    "--vocab-extra-ids": "Add the tokens to the tokenizer's file.",
    "--tokenizer-metadata": "Give --tokenizer-type and its file.",
    "--tokenizer-special-tokens": "Add the tokens to the tokenizer's file.",
    "--tokenizer-sentencepiece-legacy": "Give --special-tokens-in-text tokens.",
    "--tokenizer-sentencepiece-ignore-extra-whitespaces": FROM_FILE,
    "--no-tokenizer-sentencepiece-ignore-extra-whitespaces": FROM_FILE,
    "--tokenizer-hf-no-use-fast": "tokenizer.json is always read by the fast implementation.",
    "--tokenizer-hf-no-include-special-tokens": FROM_FILE,
    "--trust-remote-code": "Remote code is never run. Give a tokenizer.json.",
    "--null-tokenizer-pad-id": "Corpora contain no padding.",
    "--chat-template": "Format each conversation as one text beforehand.",
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown or unsupported flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    add_reading_flags(parser)
    add_json_keys(parser)
    _add_input_and_output(parser.add_argument)
    add_tokenizer_flags(parser, required=True)
    _add_encoding(parser.add_argument)
    _add_running(parser.add_argument)
    return parse_strictly(parser, argv, REFUSED)


def _add_input_and_output(add: Callable[..., argparse.Action]) -> None:
    add(
        "--text-document",
        choices=("paragraph", "file"),
        default="paragraph",
        help="document of a .txt file: text between blank lines (paragraph), or the entire file [paragraph]",
    )
    add(
        "--output-prefix",
        type=expand_user,
        required=True,
        help="path prefix of the corpora; _<key>_document is appended for each key",
    )
    add("--shard", metavar="I/N", help=SHARD)


def _add_encoding(add: Callable[..., argparse.Action]) -> None:
    add(
        "--special-tokens-in-text",
        choices=(TEXT, TOKENS),
        default=TEXT,
        help="interpretation of special tokens in documents: text, or tokens, as Megatron-LM does for all but "
        "SentencePiece models [text]",
    )
    add("--append-eod", action="store_true", help="append an end-of-document token to each document")
    add("--split-sentences", action="store_true", help="split documents into sentences, one sequence each")
    add("--keep-newlines", action="store_true", help="keep newlines between sentences when splitting")
    add("--lang", default="english", help="language of the sentence splitter [english]")
    add(
        "--nltk-data",
        type=expand_user,
        metavar="DIR",
        help="directory of the splitter's data and downloads, searched before NLTK_DATA",
    )


def _add_running(add: Callable[..., argparse.Action]) -> None:
    add("--workers", type=int, default=1, help="number of tokenization processes [1]")
    add(
        "--use-gigatoken",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="encode with gigatoken if its ids match those of the tokenizer's library, which is used otherwise",
    )
    add(
        "--resume",
        action="store_true",
        help="continue an interrupted job, if there is one, and keep partial output after an error",
    )
    add("--log-interval", type=int, help="interval of progress lines, in documents")
    add(
        "--partitions",
        type=int,
        default=1,
        help="for compatibility with Megatron-LM; must divide --workers, needs --keep-sequential-samples, no effect",
    )
    add(
        "--keep-sequential-samples",
        action="store_true",
        help="for compatibility with Megatron-LM; documents always keep the input order",
    )


def make_job(arguments: argparse.Namespace) -> Job:
    """Return the job described by the command line.

    Raises:
        ConfigError: inconsistent values, or missing input.
    """
    partitions = arguments.partitions
    if partitions < 1 or arguments.workers % partitions:
        raise ConfigError(f"--partitions {partitions} must divide --workers {arguments.workers}.")
    if partitions > 1 and not arguments.keep_sequential_samples:
        raise ConfigError(
            f"--partitions {partitions}: Megatron-LM distributes documents round-robin, which changes their order; "
            "here documents keep the input order. Add --keep-sequential-samples, or leave --partitions out."
        )
    if arguments.log_interval is not None and arguments.log_interval < 1:
        raise ConfigError(f"--log-interval is {arguments.log_interval}, and must be at least 1.")
    return Job(
        files=find_inputs(arguments.input),
        keys=arguments.json_keys,
        output_prefix=arguments.output_prefix,
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_files=TokenizerFiles.from_config(
            config_from_tokenizer_flags(arguments), arguments.special_tokens_in_text
        ),
        append_eod=arguments.append_eod,
        split_sentences=arguments.split_sentences,
        keep_newlines=arguments.keep_newlines,
        language=arguments.lang,
        nltk_data=arguments.nltk_data,
        workers=arguments.workers,
        use_gigatoken=arguments.use_gigatoken,
        skip_errors=arguments.on_error == "skip",
        lone_surrogates=arguments.lone_surrogates,
        text_document=arguments.text_document,
        shard=None if arguments.shard is None else parse_shard(arguments.shard),
        resume=arguments.resume,
        log_interval=arguments.log_interval,
    )


def main() -> int:
    """Run the command line and return the exit code."""
    return run_tool(_preprocess, "stopped; rerun the command with --resume to continue")


def _preprocess() -> None:
    job = make_job(parse_arguments(sys.argv[1:]))
    summary = preprocess(job)
    for message in summary.errors:
        print_error(f"skipped {message}")
    print_summary(f"{', '.join(job.prefix(key) for key in job.keys)}: {summary.line()}")
