"""Command-line flags of text input, shared by the preprocessing tools."""

from __future__ import annotations

import argparse

from megatron_slm.preprocessing.text_reader import ERROR, REPLACE

INPUT = """files, globs, URLs supported by fsspec (s3://, gs://, hdfs://), or - for JSON lines on standard input.
Formats: JSON lines (.jsonl or any other suffix) and plain text (.txt), optionally compressed (.gz, .bz2, .xz, .zst);
tables (.parquet, .arrow, .feather)"""


def add_json_keys(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the texts in a record."""
    parser.add_argument(
        *("--json-keys", "--json-key"),
        nargs="+",
        default=["text"],
        help="space-separated keys to extract from JSON or tables; meta.text is the key text inside meta [text]",
    )


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the input and its errors."""
    parser.add_argument("--input", nargs="+", required=True, help=INPUT)
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="on an unreadable line or file, stop without output, or skip and count it in the summary [stop]",
    )
    parser.add_argument(
        "--lone-surrogates",
        choices=(ERROR, REPLACE),
        default=ERROR,
        help="treat lone surrogates in a text (\\ud800) as an error, or replace each by U+FFFD [error]",
    )
