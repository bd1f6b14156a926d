"""Tokenize text into a ``.bin/.idx`` corpus; Megatron-LM's flags, files byte-identical to its own."""

from __future__ import annotations

import argparse
import sys

from megatron_slm.data.documents import find_inputs
from megatron_slm.data.tokenizer import KINDS, TokenizerFiles
from megatron_slm.runtime.errors import ConfigError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="files, globs or - : .jsonl or .txt, plain, .gz, .xz or .zst",
    )
    add("--json-keys", nargs="+", default=["text"], help="keys whose values are tokenized")
    add("--output-prefix", required=True, help="path of the corpus; _<key>_document is added")
    add("--tokenizer-type", required=True, choices=list(KINDS))
    add("--tokenizer-model", help="tokenizer file")
    add("--vocab-file", help="vocabulary file of GPT2BPETokenizer")
    add("--merge-file", help="merge file of GPT2BPETokenizer")
    add("--vocab-size", type=int, help="vocabulary size of NullTokenizer")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--split-sentences", action="store_true", help="one sequence per sentence")
    add("--keep-newlines", action="store_true", help="keep newlines between sentences when splitting")
    add("--lang", default="english", help="language of the sentence splitter")
    add("--workers", type=int, default=1, help="processes that tokenize")
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with a line that cannot be read",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        from megatron_slm.data.preprocess import Job, preprocess

        if arguments.workers < 1:
            raise ConfigError(f"--workers is {arguments.workers}, and must be at least 1.")
        job = Job(
            files=find_inputs(arguments.input),
            keys=arguments.json_keys,
            output_prefix=arguments.output_prefix,
            tokenizer_type=arguments.tokenizer_type,
            tokenizer_files=TokenizerFiles(
                arguments.tokenizer_model, arguments.vocab_file, arguments.merge_file, arguments.vocab_size
            ),
            append_eod=arguments.append_eod,
            split_sentences=arguments.split_sentences,
            keep_newlines=arguments.keep_newlines,
            language=arguments.lang,
            workers=arguments.workers,
            skip_errors=arguments.on_error == "skip",
        )
        summary = preprocess(job)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for message in summary.errors:
        print(f"skipped {message}", file=sys.stderr)
    print(f"{', '.join(job.prefix(key) for key in job.keys)}: {summary.line()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
