"""Flags of the text that a tool reads, the same for all tools."""

from __future__ import annotations

import argparse

from megatron_slm.preprocessing.text_reader import ERROR, REPLACE

INPUT = """files, globs, URLs that fsspec opens (s3://, gs://, hdfs://), or - for lines of JSON on standard input.
Lines of JSON (.jsonl or any other name) and plain text (.txt), each also as .gz, .bz2, .xz or .zst; tables (.parquet,
.arrow, .feather)"""


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the input and of its reading."""
    parser.add_argument("--input", nargs="+", required=True, help=INPUT)
    parser.add_argument(
        *("--json-keys", "--json-key"),
        nargs="+",
        default=["text"],
        help="keys of JSON, or columns of tables; meta.text is the entry text of meta [text]",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a line or file that cannot be read: stop and leave nothing, or go on; the summary counts them [stop]",
    )
    parser.add_argument(
        "--lone-surrogates",
        choices=(ERROR, REPLACE),
        default=ERROR,
        help="treat halves of surrogate pairs in a text (\\ud800) as an error, or replace each by U+FFFD [error]",
    )
