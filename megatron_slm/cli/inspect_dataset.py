"""Show counts, lengths and documents of a .bin/.idx corpus, and verify its integrity (--check)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.tokenizer_flags import add_tokenizer_flags, config_from_tokenizer_flags
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.output import print_error
from megatron_slm.runtime.reporting import run_tool
from megatron_slm.tokenizers.tokenizer import Tokenizer, build_run_tokenizer

if TYPE_CHECKING:
    from rich.console import Console


def parse_arguments() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("prefix", type=expand_user, help="path of the corpus without .bin or .idx suffix")
    add(
        "--documents", nargs="+", type=int, default=[], metavar="N", help="indices of documents to show; -1 is the last"
    )
    add("--max-tokens", type=int, default=1000, help="maximum number of tokens to show per document; 0 shows all")
    add("--plot", type=expand_user, metavar="FILE.png", help="write a plot of the length histogram")
    add(
        "--check", action="store_true", help="read the entire corpus and report all damage; exit code 2 if there is any"
    )
    group = parser.add_argument_group(
        "tokenizer", "to decode documents and validate token ids; without a tokenizer, --vocab-size limits ids"
    )
    add_tokenizer_flags(group)
    return parse_strictly(parser, sys.argv[1:], {})


def main() -> int:
    """Run the command line and return the exit code."""
    return run_tool(_inspect)


def _inspect() -> None:
    from megatron_slm.runtime.console import make_console

    console = make_console()
    arguments = parse_arguments()
    tokenizer = _tokenizer(arguments)
    if arguments.check:
        _check(arguments, tokenizer, console)
    _show(arguments, tokenizer, console)


def _tokenizer(arguments: argparse.Namespace) -> Tokenizer | None:
    config = config_from_tokenizer_flags(arguments)
    return None if config.tokenizer.tokenizer_type is None else build_run_tokenizer(config)


def _check(arguments: argparse.Namespace, tokenizer: Tokenizer | None, console: Console) -> None:
    """Print all damage.

    Raises:
        ConfigError: there is some.
    """
    from megatron_slm.corpus.checks import MAKE_AGAIN
    from megatron_slm.corpus.integrity import check_integrity

    limit = tokenizer.vocab_size if tokenizer else getattr(arguments, "vocab_size", None)
    found = check_integrity(arguments.prefix, limit)
    for damage in found.damage:
        for line in damage.lines():
            print_error(line)
    if found.damage:
        raise ConfigError(f"{arguments.prefix} is damaged. {MAKE_AGAIN}")
    if found.vocab_size is None:
        console.print(f"{arguments.prefix} is intact; ids were not checked (no corpus metadata: give --vocab-size)")
    else:
        console.print(f"{arguments.prefix} is intact, and all ids are below {found.vocab_size:,}")


def _show(arguments: argparse.Namespace, tokenizer: Tokenizer | None, console: Console) -> None:
    from megatron_slm.corpus.checks import check_tokenizer
    from megatron_slm.corpus.inspection import Lengths, open_corpus
    from megatron_slm.corpus.inspection_view import plot_lengths, print_counts, print_document

    index = open_corpus(arguments.prefix)
    if tokenizer is not None and index.sequences:
        check_tokenizer(arguments.prefix, tokenizer, "the corpus")
    lengths = Lengths.from_index(index)
    print_counts(console, index, lengths)
    for number in arguments.documents:
        print_document(console, index, number, tokenizer, arguments.max_tokens)
    if arguments.plot is not None:
        plot_lengths(lengths, Path(arguments.prefix).name, Path(arguments.plot))
        console.print(f"wrote {arguments.plot}")
