"""Sharding of the input over machines. The merged corpora of all shards equal the corpus of a single job.

The concatenated bytes of all files are divided into equal intervals. The unit of sharding is a document of a plain
file, a row group of a Parquet file, or any other file; a unit belongs to the shard whose interval contains its first
byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_slm.preprocessing.documents import InputChunk, align_to_document
from megatron_slm.preprocessing.inputs import DamagedFile, InputFormat, detect_format, input_size, is_seekable
from megatron_slm.preprocessing.tables import is_parquet, row_groups
from megatron_slm.runtime.errors import ConfigError

InputShard = tuple[int, int]  # shard number from 0, and shard count


def parse_shard(text: str) -> InputShard:
    """Parse ``i/n``.

    Raises:
        ConfigError: the text is not two integers with 0 <= i < n.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--shard {text}: must be i/n with i from 0 to n-1, for example 0/8 ... 7/8.")
    return int(number), int(count)


def split_inputs(files: Sequence[str], text_document: str, shard: InputShard | None) -> list[InputChunk]:
    """Return the input chunks of a job in order: all files, or a shard of them."""
    chunks = [InputChunk(name, detect_format(name, text_document), number=number) for number, name in enumerate(files)]
    if shard is None:
        return chunks
    sizes = [input_size(name) for name in files]
    total, (shard_number, count) = sum(sizes), shard
    first, last = (total * edge // count for edge in (shard_number, shard_number + 1))
    offsets = itertools.accumulate(sizes, initial=0)
    return [
        piece
        for chunk, size, offset in zip(chunks, sizes, offsets, strict=False)
        for piece in _slice_file(chunk, size, first - offset, last - offset)
    ]


def _slice_file(chunk: InputChunk, size: int, first: int, last: int) -> Iterator[InputChunk]:
    """Yield the range of a file whose units start in its bytes [first, last), which may extend beyond the file."""
    if last <= 0 or first >= size:
        return
    if is_seekable(chunk.file) and chunk.input_format in (InputFormat.JSON, InputFormat.PARAGRAPHS):
        with Path(chunk.file).open("rb") as file:
            begin, end = (
                align_to_document(file, min(max(edge, 0), size), chunk.input_format) for edge in (first, last)
            )
        if begin < end:
            yield replace(chunk, begin=begin, end=end)
    elif is_parquet(chunk.file):
        inside = [place for place, begin in enumerate(_group_offsets(chunk.file, size)) if first <= begin < last]
        if inside:
            yield replace(chunk, begin=inside[0], end=inside[-1] + 1)
    elif first <= 0:
        yield chunk


def _group_offsets(name: str, size: int) -> list[int]:
    """Return the offsets of the row groups of a Parquet file, scaled to its size; [0] for a damaged file."""
    try:
        sizes = [taken for _, taken in row_groups(name)]
    except DamagedFile:
        return [0]
    total = max(sum(sizes), 1)
    return [begin * size // total for begin in itertools.accumulate(sizes[:-1], initial=0)] if sizes else []
