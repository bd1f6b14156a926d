"""Tokenize text into a .bin/.idx corpus; Megatron-LM's flags, files byte-identical to its own.

Memory does not grow with the input: at most 3 x workers blocks are under way, each of 1 MiB of text (or one longer
document) with its ids, beside each worker's tokenizer. A job that was killed goes on with --resume.
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
from megatron_slm.preprocessing.reading_flags import add_reading_flags
from megatron_slm.preprocessing.shards import parse_shard
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.output import prepare_output
from megatron_slm.tokenizers.base import TEXT, TOKENS, TokenizerFiles

SHARD = """make only part i (from 0) of n about equal ones, into the folder <output-prefix>_<key>_document;
tools/merge_datasets.py --input <that folder> makes of all parts the corpus that one machine would have made"""

MEASURE = "benchmarks/benchmark_preprocess.py measures speed."
FROM_FILE = "The tokenizer's own file says it."
REFUSED = {  # flags of Megatron-LM's tool, or of earlier versions, that are not taken, and what to do
    "--no-word-cache": "The word cache is gone. --no-use-gigatoken encodes by the tokenizer's library alone.",
    "--find-optimal-num-workers": MEASURE,
    "--workers-to-check": MEASURE,
    "--max-documents": MEASURE,
    "--padded-vocab-size": "Corpora depend on the exact vocabulary; the trainer pads.",
    "--pad-vocab-size": "Corpora depend on the exact vocabulary; the trainer pads.",
    "--no-pad-vocab-size": "Corpora depend on the exact vocabulary; the trainer pads.",
    "--vocab-extra-ids": "Add the tokens to the tokenizer's file.",
    "--tokenizer-metadata": "Give --tokenizer-type and its file.",
    "--tokenizer-special-tokens": "Add the tokens to the tokenizer's file.",
    "--tokenizer-sentencepiece-legacy": "Give --special-tokens-in-text tokens.",
    "--tokenizer-sentencepiece-ignore-extra-whitespaces": FROM_FILE,
    "--no-tokenizer-sentencepiece-ignore-extra-whitespaces": FROM_FILE,
    "--tokenizer-hf-no-use-fast": "tokenizer.json is always read by the fast library.",
    "--tokenizer-hf-no-include-special-tokens": FROM_FILE,
    "--trust-remote-code": "No code of others is run: give a tokenizer.json.",
    "--null-tokenizer-pad-id": "Corpora hold no padding.",
    "--chat-template": "Format conversations before, into one text each.",
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """
    Raises:
        ConfigError: an unknown flag, one of Megatron-LM's that is not taken, or a bad value.
    """
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reading_flags(parser)
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
        help="a document of a .txt file is what stands between blank lines, or the whole file [paragraph]",
    )
    add(
        "--output-prefix",
        type=expand_user,
        required=True,
        help="path of the corpora, one per key; _<key>_document is added",
    )
    add("--shard", metavar="I/N", help=SHARD)


def _add_encoding(add: Callable[..., argparse.Action]) -> None:
    add(
        "--special-tokens-in-text",
        choices=(TEXT, TOKENS),
        default=TEXT,
        help="read special tokens that occur in a text as text, or as tokens, as Megatron-LM does for all but "
        "SentencePiece models [text]",
    )
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--split-sentences", action="store_true", help="one sequence per sentence")
    add("--keep-newlines", action="store_true", help="keep newlines between sentences when splitting")
    add("--lang", default="english", help="language of the sentence splitter [english]")
    add(
        "--nltk-data",
        type=expand_user,
        metavar="DIR",
        help="where the splitter's data is, or is downloaded to, before NLTK_DATA",
    )


def _add_running(add: Callable[..., argparse.Action]) -> None:
    add("--workers", type=int, default=1, help="processes that tokenize [1]")
    add(
        "--use-gigatoken",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="encode with gigatoken if it gives the tokenizer's ids, else or if refused with the tokenizer's library",
    )
    add(
        "--resume", action="store_true", help="go on where a stopped job was, if there is one; keep what an error stops"
    )
    add("--log-interval", type=int, help="also print a line every so many documents")
    add(
        "--partitions",
        type=int,
        default=1,
        help="of Megatron-LM: must divide --workers; more than 1 needs --keep-sequential-samples, and changes nothing",
    )
    add("--keep-sequential-samples", action="store_true", help="of Megatron-LM: the order of the input, as always here")


def make_job(arguments: argparse.Namespace) -> Job:
    """
    Raises:
        ConfigError: values that do not fit, or input that is not there.
    """
    partitions = arguments.partitions
    if partitions < 1 or arguments.workers % partitions:
        raise ConfigError(f"--partitions {partitions} must divide --workers {arguments.workers}.")
    if partitions > 1 and not arguments.keep_sequential_samples:
        raise ConfigError(
            f"--partitions {partitions}: in Megatron-LM it deals the documents out in turn, which changes their order; "
            "here they keep the order of the input. Say so with --keep-sequential-samples, or leave --partitions out."
        )
    if arguments.log_interval is not None and arguments.log_interval < 1:
        raise ConfigError(f"--log-interval is {arguments.log_interval}, and must be at least 1.")
    return Job(
        files=find_inputs(arguments.input),
        keys=arguments.json_keys,
        output_prefix=arguments.output_prefix,
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_files=TokenizerFiles.of(config_from_tokenizer_flags(arguments), arguments.special_tokens_in_text),
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
    prepare_output()
    try:
        job = make_job(parse_arguments(sys.argv[1:]))
        summary = preprocess(job)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    for message in summary.errors:
        print(f"skipped {message}", file=sys.stderr)
    print(f"{', '.join(job.prefix(key) for key in job.keys)}: {summary.line()}")
    return 0
