"""Train a sentencepiece tokenizer (BPE or unigram) with Llama-like defaults."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.preprocessing.documents import find_inputs
from megatron_slm.preprocessing.reading_flags import add_json_keys, add_reading_flags
from megatron_slm.preprocessing.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_slm.runtime.output import print_error, print_summary
from megatron_slm.runtime.reporting import run_tool


def parse_arguments() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    add_reading_flags(parser)
    add_json_keys(parser)
    add = parser.add_argument
    add("--output-prefix", type=expand_user, required=True, help="path of the model without .model or .vocab suffix")
    add("--vocab-size", type=int, default=32000, help="vocabulary size [32000]")
    add("--model-type", choices=("bpe", "unigram"), default="bpe", help="model type [bpe]")
    add("--max-lines", type=int, default=1_000_000, help="maximum number of training lines [1000000]")
    add("--threads", type=int, default=os.cpu_count() or 1, help="number of threads [all cores]")
    return parse_strictly(parser, sys.argv[1:], {})


def main() -> int:
    """Run the command line and return the exit code."""
    return run_tool(_train, "stopped; an existing model is unchanged")


def _train() -> None:
    arguments = parse_arguments()
    job = TokenizerJob(
        files=find_inputs(arguments.input),
        output_prefix=arguments.output_prefix,
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        json_keys=arguments.json_keys,
        max_lines=arguments.max_lines,
        threads=arguments.threads,
        skip_errors=arguments.on_error == "skip",
        lone_surrogates=arguments.lone_surrogates,
    )
    trained = train_tokenizer(job)
    for message in trained.errors:
        print_error(f"skipped {message}")
    print_summary(f"wrote {trained.path} ({trained.vocab_size:,} pieces), {trained.skipped:,} skipped")
