"""Tokenize fine-tuning examples into a .bin/.idx corpus and the loss mask of their answers, for --objective sft.

Each line or row of the input has the keys prompt and completion, or messages (role and content), or conversations (from
and value), or instruction, input and output. Conversations are formatted by the chat template of the tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.tokenizer_flags import add_tokenizer_flags, config_from_tokenizer_flags
from megatron_slm.finetune.preprocess import DROP, REFUSE, TRUNCATE, FinetuneJob, preprocess_examples
from megatron_slm.preprocessing.documents import find_inputs
from megatron_slm.preprocessing.reading_flags import add_reading_flags
from megatron_slm.runtime.output import print_error, print_summary
from megatron_slm.runtime.reporting import run_tool
from megatron_slm.tokenizers.base import TOKENS, TokenizerFiles

SEPARATELY = "Tokenize the files separately, and merge their corpora with tools/merge_datasets.py."
REFUSED = {
    "--resume": f"A stopped job starts from scratch. {SEPARATELY}",
    "--shard": SEPARATELY,
    "--append-eod": "Completions end with the end-of-document token, conversations as their template says.",
    "--json-keys": "The keys are prompt and completion, messages, conversations, or instruction, input and output.",
    "--sft-tokenizer-prompt-format": "Give a chat template with --chat-template FILE.",
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown or unsupported flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    add_reading_flags(parser)
    _add_output(parser.add_argument)
    add_tokenizer_flags(parser, required=True)
    _add_examples(parser.add_argument)
    return parse_strictly(parser, argv, REFUSED)


def _add_output(add: Callable[..., argparse.Action]) -> None:
    add("--output-prefix", type=expand_user, required=True, help="path prefix of the corpus; _sft_document is appended")
    add("--workers", type=int, default=1, help="number of tokenization processes [1]")


def _add_examples(add: Callable[..., argparse.Action]) -> None:
    add(
        "--chat-template",
        metavar="FILE",
        help="Jinja template of conversations, as a file or text; default that of the tokenizer",
    )
    add("--seq-length", type=int, help="maximum tokens of an example, the --seq-length of the run; default no limit")
    add(
        "--long-examples",
        choices=(REFUSE, TRUNCATE, DROP),
        default=REFUSE,
        help="handling of examples longer than --seq-length; both truncated and dropped ones are counted [refuse]",
    )
    add(
        "--special-tokens-in-text",
        choices=(REFUSE, TOKENS),
        default=REFUSE,
        help="handling of special tokens in the texts of an example: an error, or encode them as tokens [refuse]",
    )
    add(
        "--split-at-system",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start another example at each system message, as Megatron-LM does for packed conversations",
    )
    add(
        "--split-at-answers",
        action="store_true",
        help="make each answer an example, preceded by the conversation before it as in generation; for templates that "
        "format earlier messages differently",
    )


def make_job(arguments: argparse.Namespace) -> FinetuneJob:
    """Return the job described by the command line.

    Raises:
        ConfigError: inconsistent values, or missing input.
    """
    return FinetuneJob(
        files=find_inputs(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_files=TokenizerFiles.from_config(config_from_tokenizer_flags(arguments)),
        chat_template=arguments.chat_template,
        seq_length=arguments.seq_length,
        long_examples=arguments.long_examples,
        special_tokens=arguments.special_tokens_in_text,
        splits_at_system=arguments.split_at_system,
        splits_at_answers=arguments.split_at_answers,
        lone_surrogates=arguments.lone_surrogates,
        workers=arguments.workers,
        skip_errors=arguments.on_error == "skip",
    )


def main() -> int:
    """Run the command line and return the exit code."""
    return run_tool(_preprocess, "stopped; an existing corpus is unchanged")


def _preprocess() -> None:
    job = make_job(parse_arguments(sys.argv[1:]))
    summary = preprocess_examples(job)
    for message in summary.errors:
        print_error(f"skipped {message}")
    print_summary(f"{job.prefix}: {summary.line()}")
