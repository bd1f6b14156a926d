"""Train a sentencepiece tokenizer (BPE or unigram) with Llama-like defaults."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_slm.data.preprocessing.documents import find_inputs
from megatron_slm.data.preprocessing.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_slm.runtime.errors import ConfigError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files or globs: .jsonl or .txt, plain, .gz, .xz or .zst")
    add("--json-key", default="text", help="key that holds the text")
    add("--output-prefix", required=True, help="path of the model; .model and .vocab are added")
    add("--vocab-size", type=int, default=32000)
    add("--model-type", choices=("bpe", "unigram"), default="bpe")
    add("--max-lines", type=int, default=1_000_000, help="lines that are learned from, at most")
    add("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        job = TokenizerJob(
            files=find_inputs(arguments.input),
            output_prefix=arguments.output_prefix,
            vocab_size=arguments.vocab_size,
            model_type=arguments.model_type,
            json_key=arguments.json_key,
            max_lines=arguments.max_lines,
            threads=arguments.threads,
        )
        print(f"wrote {train_tokenizer(job)} ({arguments.vocab_size:,} pieces)")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
