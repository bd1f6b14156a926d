"""Input files as blocks: consecutive documents of one file, cut between two documents, of about 1 MiB.

A block is what one worker encodes at once. Of a plain local file it is only a range of bytes, which the worker reads
for itself; of all else (compressed, piped, remote, tables) it carries the bytes.
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
    Form,
    check_encoding,
    chunks,
    find_inputs,
    is_seekable,
    read_range,
    size_of,
    total_bytes,
)
from megatron_slm.preprocessing.tables import batches, row_groups, rows_of
from megatron_slm.runtime.errors import ConfigError

__all__ = ["Block", "Part", "Values", "blocks_of", "find_inputs", "total_bytes"]

BLOCK = 1 << 20  # bytes of text
BLANK_LINE = re.compile(rb"\n[ \t\r\x0b\x0c]*\n")
Values = tuple[Any, ...]  # of one document, by key


@dataclass(frozen=True)
class Part:
    """A piece of the input that one job reads: a file, or a piece of one.

    ``begin`` and ``end`` are bytes of a plain file, and row groups of a Parquet file; ``end`` None is the file's end.
    """

    file: str
    form: Form
    begin: int = 0
    end: int | None = None
    number: int = 0  # in the order of the input


@dataclass(frozen=True)
class Block:
    """Consecutive documents of one part.

    ``begin`` and ``end`` are where it lies in the part: bytes without the compression, or rows.
    """

    part: Part
    begin: int
    end: int
    content: bytes | None  # lines, a text or an Arrow stream; None: the range of bytes of the file
    read: float  # bytes of the file that it took, for the bar
    damage: str = ""  # what is wrong with the file behind this block, which then is empty

    def load(self) -> bytes:
        """Return the bytes of its documents, without the byte-order mark of the file.

        Raises:
            ConfigError: the file has become shorter.
        """
        content = read_range(self.part.file, self.begin, self.end) if self.content is None else self.content
        begins_text = self.begin == 0 and self.part.form is not Form.TABLE
        return content.removeprefix(BYTE_ORDER_MARK) if begins_text else content

    def lines(self, content: bytes) -> int:
        """Lines (or rows) in it, of which ``content`` is what :meth:`load` gave."""
        return self.end - self.begin if self.part.form is Form.TABLE else content.count(b"\n")


def blocks_of(part: Part, keys: Sequence[str], begin: int = 0) -> Iterator[Block]:
    """The blocks of a part from a place on, which is the ``end`` of an earlier block.

    Memory: one block, or where a single document is longer, twice that document.

    Raises:
        ConfigError: a table without the columns ``keys``, or a file that cannot be read. A file that is cut short is
            no error: its last block names the damage.
    """
    if part.form is Form.TABLE:
        source = _table_blocks(part, keys, begin)
    else:
        source = _range_blocks(part, begin) if is_seekable(part.file) else _stream_blocks(part, begin)
    end = begin
    try:
        for block in source:
            yield block
            end = block.end
    except DamagedFile as error:
        yield Block(part, end, end, b"", 0, str(error))
    except OSError as error:
        raise ConfigError(
            f"--input {part.file} cannot be read: {error}. Begin again when it can be read (--resume continues a "
            "preprocessing job that had it)."
        ) from error


def documents_in(content: bytes, form: Form, keys: Sequence[str]) -> Iterator[tuple[int, Values | bytes]]:
    """The documents of a block, of which ``content`` is what :meth:`Block.load` gives.

    Yields (line or row within the block, counted from 0; values by key, or the bytes of a line of JSON or of a text).
    """
    if form is Form.TABLE:
        yield from enumerate(rows_of(content, keys))
    elif form is Form.JSON:
        yield from enumerate(content.removesuffix(b"\n").split(b"\n"))
    elif form is Form.PARAGRAPHS:
        yield from _paragraphs(content)
    else:
        yield 0, content


def is_blank(document: bytes) -> bool:
    """Return whether a line holds white space only."""
    return not document or document.isspace()


def aligned(file: IO[bytes], offset: int, form: Form) -> int:
    """The first byte at or after ``offset`` at which a document may begin."""
    if offset <= 0:
        return 0
    file.seek(offset - 1)
    line = file.readline()
    while form is Form.PARAGRAPHS and line.endswith(b"\n"):
        line = file.readline()
        if not line.strip():
            break
    return file.tell()


def first_line(part: Part) -> int:
    """The line (or row) of its file at which a part begins, counted from 1."""
    if part.begin == 0:
        return 1
    if part.form is Form.TABLE:
        return 1 + sum(rows for rows, _ in row_groups(part.file)[: part.begin])
    line, left = 1, part.begin
    with Path(part.file).open("rb") as file:
        while left and (data := file.read(min(left, BLOCK))):
            line += data.count(b"\n")
            left -= len(data)
    return line


def _range_blocks(part: Part, begin: int) -> Iterator[Block]:
    size = size_of(part.file) if part.end is None else part.end
    begin = max(begin, part.begin)
    with Path(part.file).open("rb") as file:
        check_encoding(file.read(16))
        while begin < size:
            end = size if part.form is Form.WHOLE else min(size, aligned(file, begin + BLOCK, part.form))
            yield Block(part, begin, end, None, end - begin)
            begin = end


def _stream_blocks(part: Part, begin: int) -> Iterator[Block]:
    held: list[bytes] = []
    size, wanted, read, skip, position = 0, BLOCK, 0, begin, 0
    try:
        for data, taken in chunks(part.file):
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
            cut = _last_boundary(content, part.form)
            held, size, wanted = [content[cut:]], size - cut, BLOCK
            if cut == 0:
                wanted = 2 * size  # a long document: joined again only when as much has come
                continue
            yield Block(part, begin, begin + cut, content[:cut], read)
            begin, read = begin + cut, 0
    except DamagedFile:
        rest = b"".join(held)
        rest = rest[: _last_boundary(rest, part.form)]  # what stands behind it was cut in two
        if rest:
            yield Block(part, begin, begin + len(rest), rest, read)
        raise
    if rest := b"".join(held):
        yield Block(part, begin, begin + len(rest), rest, read)


def _table_blocks(part: Part, keys: Sequence[str], begin: int) -> Iterator[Block]:
    size, groups = size_of(part.file), (part.begin, part.end)
    for content, rows, share in batches(part.file, keys, BLOCK, groups, begin):
        yield Block(part, begin, begin + rows, content, share * size)
        begin += rows


def _last_boundary(content: bytes, form: Form) -> int:
    """Bytes of ``content`` up to the last place where one document ends and another may begin; 0: there is none."""
    if form is Form.JSON:
        return content.rfind(b"\n") + 1
    cut = 0
    if form is Form.PARAGRAPHS:
        for blank in BLANK_LINE.finditer(content):
            cut = blank.end()
    return cut


def _paragraphs(content: bytes) -> Iterator[tuple[int, bytes]]:
    lines: list[bytes] = []
    begin = 0
    for number, line in enumerate(io.BytesIO(content)):  # at \n alone, where splitlines knows more
        if line.strip():
            if not lines:
                begin = number
            lines.append(line)
        elif lines:
            yield begin, b"".join(lines)
            lines = []
    if lines:
        yield begin, b"".join(lines)
