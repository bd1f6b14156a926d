"""Splitting of input files into blocks of about 1 MiB at document boundaries.

A block is the unit of work of a worker process. For a plain local file it holds only a byte range, which the worker
reads; for other input (compressed, piped, remote, tables) it holds the content.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_slm.preprocessing.inputs import (
    BYTE_ORDER_MARK,
    DamagedFile,
    InputFormat,
    check_encoding,
    find_inputs,
    input_size,
    is_seekable,
    read_decompressed,
    read_range,
    total_bytes,
)
from megatron_slm.preprocessing.tables import decode_rows, read_batches, row_groups
from megatron_slm.runtime.errors import ConfigError

__all__ = ["Block", "InputChunk", "Values", "find_inputs", "read_blocks", "total_bytes"]

BLOCK = 1 << 20  # target size in bytes of text
BLANK_LINE = re.compile(rb"\n[ \t\r\x0b\x0c]*\n")
Values = tuple[Any, ...]  # values of one document, one per key


@dataclass(frozen=True)
class InputChunk:
    """Represent an input file, or the range of it that a job reads.

    ``begin`` and ``end`` are byte offsets of a plain file or row groups of a Parquet file; ``end`` None is the end of
    the file.
    """

    file: str
    input_format: InputFormat
    begin: int = 0
    end: int | None = None
    number: int = 0  # position in the input list


@dataclass(frozen=True)
class Block:
    """Represent consecutive documents of one input chunk.

    ``begin`` and ``end`` are its range in the file: offsets of decompressed bytes, or rows.
    """

    chunk: InputChunk
    begin: int
    end: int
    content: bytes | None  # lines, a text or an Arrow stream; None: the byte range of the file
    read: float  # bytes read from the file, for the progress bar
    damage: str = ""  # damage of the file at the end of this block, which is then empty

    def load(self) -> bytes:
        """Return the bytes of the documents, without the byte-order mark of the file.

        Raises:
            ConfigError: the file was truncated in the meantime.
        """
        content = read_range(self.chunk.file, self.begin, self.end) if self.content is None else self.content
        begins_text = self.begin == 0 and self.chunk.input_format is not InputFormat.TABLE
        return content.removeprefix(BYTE_ORDER_MARK) if begins_text else content

    def lines(self, content: bytes) -> int:
        """Return the number of lines (or rows); ``content`` is the result of :meth:`load`."""
        return self.end - self.begin if self.chunk.input_format is InputFormat.TABLE else content.count(b"\n")


def read_blocks(chunk: InputChunk, keys: Sequence[str], begin: int = 0) -> Iterator[Block]:
    """Yield the blocks of an input chunk, resuming at the ``end`` of an earlier block.

    Memory use is one block, or twice the size of a single longer document.

    Raises:
        ConfigError: a table lacks a column of ``keys``, or the file cannot be read. A truncated file raises no error;
            its last block describes the damage.
    """
    if chunk.input_format is InputFormat.TABLE:
        source = _table_blocks(chunk, keys, begin)
    else:
        source = _range_blocks(chunk, begin) if is_seekable(chunk.file) else _stream_blocks(chunk, begin)
    end = begin
    try:
        for block in source:
            yield block
            end = block.end
    except DamagedFile as error:
        yield Block(chunk, end, end, b"", 0, str(error))
    except OSError as error:
        raise ConfigError(
            f"--input {chunk.file} cannot be read: {error}. Restart when it can be read (--resume continues a "
            "preprocessing job that was started with it)."
        ) from error


def iter_documents(
    content: bytes, input_format: InputFormat, keys: Sequence[str]
) -> Iterator[tuple[int, Values | bytes]]:
    """Yield the documents of a block's ``content`` (the result of :meth:`Block.load`).

    Yields:
        the line or row within the block, from 0, and the values by key or the bytes of a JSON line or text.
    """
    if input_format is InputFormat.TABLE:
        yield from enumerate(decode_rows(content, keys))
    elif input_format is InputFormat.JSON:
        yield from enumerate(content.removesuffix(b"\n").split(b"\n"))
    elif input_format is InputFormat.PARAGRAPHS:
        yield from _paragraphs(content)
    else:
        yield 0, content


def is_blank(document: bytes) -> bool:
    """Return whether a line contains only white space."""
    return not document or document.isspace()


def align_to_document(file: IO[bytes], offset: int, input_format: InputFormat) -> int:
    """Return the first document boundary at or after byte ``offset``."""
    if offset <= 0:
        return 0
    file.seek(offset - 1)
    line = file.readline()
    while input_format is InputFormat.PARAGRAPHS and line.endswith(b"\n"):
        line = file.readline()
        if not line.strip():
            break
    return file.tell()


def first_line(chunk: InputChunk) -> int:
    """Return the number of the first line (or row) of an input chunk in its file, from 1."""
    if chunk.begin == 0:
        return 1
    if chunk.input_format is InputFormat.TABLE:
        return 1 + sum(rows for rows, _ in row_groups(chunk.file)[: chunk.begin])
    line, remaining = 1, chunk.begin
    with Path(chunk.file).open("rb") as file:
        while remaining and (data := file.read(min(remaining, BLOCK))):
            line += data.count(b"\n")
            remaining -= len(data)
    return line


def _range_blocks(chunk: InputChunk, begin: int) -> Iterator[Block]:
    size = input_size(chunk.file) if chunk.end is None else chunk.end
    begin = max(begin, chunk.begin)
    with Path(chunk.file).open("rb") as file:
        check_encoding(file.read(16))
        while begin < size:
            end = size
            if chunk.input_format is not InputFormat.WHOLE:
                end = min(size, align_to_document(file, begin + BLOCK, chunk.input_format))
            yield Block(chunk, begin, end, None, end - begin)
            begin = end


def _stream_blocks(chunk: InputChunk, begin: int) -> Iterator[Block]:
    held: list[bytes] = []
    size, wanted, read, skip, position = 0, BLOCK, 0, begin, 0
    try:
        for data, taken in read_decompressed(chunk.file):
            if not position:
                check_encoding(data)
            position += len(data)
            read += taken
            data, skip = data[skip:], max(0, skip - len(data))
            held.append(data)
            size += len(data)
            if size < wanted:
                continue
            content = b"".join(held)
            boundary = _last_boundary(content, chunk.input_format)
            held, size, wanted = [content[boundary:]], size - boundary, BLOCK
            if boundary == 0:
                wanted = 2 * size  # doubling bounds the copying for a long document
                continue
            yield Block(chunk, begin, begin + boundary, content[:boundary], read)
            begin, read = begin + boundary, 0
    except DamagedFile:
        rest = b"".join(held)
        rest = rest[: _last_boundary(rest, chunk.input_format)]  # without the incomplete last document
        if rest:
            yield Block(chunk, begin, begin + len(rest), rest, read)
        raise
    if rest := b"".join(held):
        yield Block(chunk, begin, begin + len(rest), rest, read)


def _table_blocks(chunk: InputChunk, keys: Sequence[str], begin: int) -> Iterator[Block]:
    size, groups = input_size(chunk.file), (chunk.begin, chunk.end)
    for content, rows, share in read_batches(chunk.file, keys, BLOCK, groups, begin):
        yield Block(chunk, begin, begin + rows, content, share * size)
        begin += rows


def _last_boundary(content: bytes, input_format: InputFormat) -> int:
    """Return the offset of the last document boundary in ``content``, or 0 if there is none."""
    if input_format is InputFormat.JSON:
        return content.rfind(b"\n") + 1
    boundary = 0
    if input_format is InputFormat.PARAGRAPHS:
        for blank in BLANK_LINE.finditer(content):
            boundary = blank.end()
    return boundary


def _paragraphs(content: bytes) -> Iterator[tuple[int, bytes]]:
    lines: list[bytes] = []
    begin = 0
    for number, line in enumerate(io.BytesIO(content)):  # splits at \n only, unlike splitlines
        if line.strip():
            if not lines:
                begin = number
            lines.append(line)
        elif lines:
            yield begin, b"".join(lines)
            lines = []
    if lines:
        yield begin, b"".join(lines)
