"""Concatenate corpora in order; supports Megatron-LM's flags and a list of prefixes."""

from __future__ import annotations

import argparse
import sys

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.runtime.output import print_error, print_summary
from megatron_slm.runtime.reporting import run_tool


def parse_arguments() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=expand_user, metavar="DIR", help="directory of corpora, to merge in name order")
    source.add_argument(
        "--input-prefixes", type=expand_user, nargs="+", metavar="P", help="prefixes of corpora, to merge in this order"
    )
    parser.add_argument(
        "--output-prefix",
        type=expand_user,
        required=True,
        metavar="P",
        help="path of the merged corpus without .bin or .idx suffix",
    )
    return parse_strictly(parser, sys.argv[1:], {})


def main() -> int:
    """Run the command line and return the exit code."""
    return run_tool(_merge, "stopped; an existing corpus is unchanged")


def _merge() -> None:
    arguments = parse_arguments()
    from megatron_slm.preprocessing.merge import merge_corpora
    from megatron_slm.preprocessing.shard_names import find_shards

    prefixes = arguments.input_prefixes or find_shards(arguments.input, arguments.output_prefix)
    merged = merge_corpora(prefixes, arguments.output_prefix)
    if merged.unrecorded:
        print_error(f"no corpus metadata written: {merged.unrecorded[0]} has none")
    print_summary(
        f"{arguments.output_prefix}: {merged.documents:,} documents, {merged.tokens:,} tokens from "
        f"{merged.corpora:,} corpora"
    )
