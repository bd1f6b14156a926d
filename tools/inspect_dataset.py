"""Tell what a .bin/.idx corpus holds: counts, lengths, documents; and whether it is whole (--check)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.data.tokenizers.tokenizer import KINDS, Tokenizer, TokenizerFiles, build_tokenizer
from megatron_slm.runtime.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("prefix", help="path of the corpus without .bin and .idx")
    add("--documents", nargs="+", type=int, default=[], metavar="N", help="show these; -1 is the last")
    add("--max-tokens", type=int, default=1000, help="tokens that are shown of each document; 0: all")
    add("--plot", metavar="FILE.png", help="write the histogram of lengths as a plot")
    add(
        "--check", action="store_true", help="read the whole corpus and tell all damage; exit code 2 where there is any"
    )
    add("--tokenizer-type", choices=list(KINDS), help="decode documents, and check ids against its vocabulary")
    add("--tokenizer-model", help="tokenizer file")
    add("--vocab-file", help="vocabulary file of GPT2BPETokenizer")
    add("--merge-file", help="merge file of GPT2BPETokenizer")
    add("--vocab-size", type=int, help="vocabulary size of NullTokenizer; without a tokenizer, ids must lie below it")
    return parser.parse_args()


def main() -> int:
    from rich.console import Console

    arguments = parse_arguments()
    console = Console(highlight=False, soft_wrap=True)
    try:
        tokenizer = _tokenizer(arguments)
        if arguments.check and _check(arguments, tokenizer, console):
            return ConfigError.exit_code
        _show(arguments, tokenizer, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _tokenizer(arguments: argparse.Namespace) -> Tokenizer | None:
    if arguments.tokenizer_type is None:
        return None
    files = TokenizerFiles(arguments.tokenizer_model, arguments.vocab_file, arguments.merge_file, arguments.vocab_size)
    return build_tokenizer(arguments.tokenizer_type, files)


def _check(arguments: argparse.Namespace, tokenizer: Tokenizer | None, console: Console) -> bool:
    """Print all damage; whether there is any."""
    from megatron_slm.data.integrity import check_integrity

    found = check_integrity(arguments.prefix, tokenizer.vocab_size if tokenizer else arguments.vocab_size)
    for damage in found.damage:
        for line in damage.lines():
            print(line, file=sys.stderr)
    if found.damage:
        print(f"error: {arguments.prefix} is damaged. Make it again with tools/preprocess_data.py.", file=sys.stderr)
    elif found.vocab_size is None:
        console.print(f"{arguments.prefix} is whole; ids were not looked at (no corpus metadata: give --vocab-size)")
    else:
        console.print(f"{arguments.prefix} is whole, and all ids lie below {found.vocab_size:,}")
    return bool(found.damage)


def _show(arguments: argparse.Namespace, tokenizer: Tokenizer | None, console: Console) -> None:
    from megatron_slm.data.corpus import check_tokenizer
    from megatron_slm.data.inspection import Lengths, open_corpus
    from megatron_slm.data.inspection_view import plot_lengths, print_counts, print_document

    index = open_corpus(arguments.prefix)
    if tokenizer is not None and index.sequences:
        check_tokenizer(arguments.prefix, tokenizer, "the corpus")
    lengths = Lengths.of(index)
    print_counts(console, index, lengths)
    for number in arguments.documents:
        print_document(console, index, number, tokenizer, arguments.max_tokens)
    if arguments.plot is not None:
        plot_lengths(lengths, Path(arguments.prefix).name, Path(arguments.plot))
        console.print(f"wrote {arguments.plot}")


if __name__ == "__main__":
    sys.exit(main())
