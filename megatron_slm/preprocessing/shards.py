"""Cuts the input into shards of about equal size, one for each machine; their corpora merge to that of one machine.

The files stand one behind the other as one row of bytes, which is cut into equal intervals. Everything belongs to the
shard in whose interval it begins: a document of a plain file, a row group of a Parquet file, any other file whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_slm.preprocessing.documents import Part, aligned
from megatron_slm.preprocessing.inputs import DamagedFile, Form, form_of, is_seekable, size_of
from megatron_slm.preprocessing.tables import is_parquet, row_groups
from megatron_slm.runtime.errors import ConfigError

Shard = tuple[int, int]  # number, counted from 0, and how many there are


def parse_shard(text: str) -> Shard:
    """Read ``i/n``.

    Raises:
        ConfigError: not two numbers with 0 <= i < n.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--shard {text} should be i/n with i from 0 to n-1, for example 0/8 ... 7/8.")
    return int(number), int(count)


def plan(files: Sequence[str], text_document: str, shard: Shard | None) -> list[Part]:
    """What one job reads, in order: all of the files, or a shard of them."""
    parts = [Part(name, form_of(name, text_document), number=number) for number, name in enumerate(files)]
    if shard is None:
        return parts
    sizes = [size_of(name) for name in files]
    total, (place, count) = sum(sizes), shard
    first, last = (total * edge // count for edge in (place, place + 1))
    begins = itertools.accumulate(sizes, initial=0)
    return [
        piece
        for part, size, begin in zip(parts, sizes, begins, strict=False)
        for piece in _cut(part, size, first - begin, last - begin)
    ]


def _cut(part: Part, size: int, first: int, last: int) -> Iterator[Part]:
    """What of a part begins in the bytes from ``first`` up to ``last`` of its file (either may lie outside of it)."""
    if last <= 0 or first >= size:
        return
    if is_seekable(part.file) and part.form in (Form.JSON, Form.PARAGRAPHS):
        with Path(part.file).open("rb") as file:
            begin, end = (aligned(file, min(max(edge, 0), size), part.form) for edge in (first, last))
        if begin < end:
            yield replace(part, begin=begin, end=end)
    elif is_parquet(part.file):
        inside = [place for place, begin in enumerate(_group_begins(part.file, size)) if first <= begin < last]
        if inside:
            yield replace(part, begin=inside[0], end=inside[-1] + 1)
    elif first <= 0:
        yield part


def _group_begins(name: str, size: int) -> list[int]:
    """Where the row groups of a Parquet file begin, scaled to its size; a damaged file has one, which says so."""
    try:
        sizes = [taken for _, taken in row_groups(name)]
    except DamagedFile:
        return [0]
    total = max(sum(sizes), 1)
    return [begin * size // total for begin in itertools.accumulate(sizes[:-1], initial=0)] if sizes else []
