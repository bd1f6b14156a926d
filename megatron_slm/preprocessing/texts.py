"""Extraction of the texts of a block to Arrow arrays: in bulk if every line is valid, otherwise document by document.

The result for a document does not depend on the other lines of its block: Arrow reads only blocks in which all lines
are valid, and :class:`TextReader` falls back to Arrow for lines that Python's JSON reader rejects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from megatron_slm.preprocessing.arrow_columns import json_columns, table_columns
from megatron_slm.preprocessing.documents import is_blank, iter_documents
from megatron_slm.preprocessing.inputs import InputFormat
from megatron_slm.preprocessing.text_reader import UNREADABLE, Text, TextReader, describe_error

Split = Callable[[str], list[str]]


@dataclass
class Column:
    """Hold the concatenated sequences of all documents for one key."""

    texts: pa.LargeStringArray
    counts: np.ndarray  # [documents] sequences of each document

    def document(self, place: int) -> Column:
        """Return the column of one document."""
        begin = int(self.counts[:place].sum())
        return Column(self.texts.slice(begin, int(self.counts[place])), self.counts[place : place + 1])


@dataclass
class Texts:
    """Hold the readable documents of a block, and the unreadable ones with their reasons."""

    columns: list[Column]  # by key
    lines: Sequence[int]  # line of each document within the block
    blank_lines: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)  # line within the block, reason

    def __len__(self) -> int:
        return len(self.lines)

    def bytes(self) -> int:
        """Return the UTF-8 size of all texts."""
        return sum(_utf8_bytes(column.texts) for column in self.columns)

    def select(self, places: Sequence[int]) -> Texts:
        """Return the documents with the given indices."""
        columns = []
        for column in self.columns:
            parts = [column.document(place) for place in places]
            arrays = [part.texts for part in parts] or [column.texts.slice(0, 0)]
            columns.append(Column(pa.concat_arrays(arrays), column.counts[list(places)]))
        return Texts(columns, [self.lines[place] for place in places], self.blank_lines, self.bad)


def read_block_texts(content: bytes, input_format: InputFormat, reader: TextReader, split: Split | None) -> Texts:
    """Return the texts of a block.

    Args:
        content: lines, a text, or an Arrow stream; the result of ``Block.load``.
        input_format: format of the file.
        reader: extracts the texts of a document.
        split: function from a text to its sentences, each of which becomes a sequence; None makes each text, or each
            text of a list, a sequence.
    """
    if split is None:
        arrays = {InputFormat.JSON: json_columns, InputFormat.TABLE: table_columns}.get(input_format, lambda *_: None)(
            content, reader.keys
        )
        if arrays is not None:
            ones = np.ones(len(arrays[0]), np.int64)
            return Texts([Column(array, ones) for array in arrays], range(len(arrays[0])))
    return _one_by_one(content, input_format, reader, split)


def _one_by_one(content: bytes, input_format: InputFormat, reader: TextReader, split: Split | None) -> Texts:
    keys = reader.keys
    sequences: list[list[bytes]] = [[] for _ in keys]
    counts: list[list[int]] = [[] for _ in keys]
    found = Texts([], [])
    lines = []
    for line, document in iter_documents(content, input_format, keys):
        if isinstance(document, bytes) and is_blank(document):
            found.blank_lines += 1
            continue
        try:
            values = [_sequences(text, split) for text in reader(document, input_format is InputFormat.JSON)]
        except UNREADABLE as error:
            found.bad.append((line, describe_error(error)))
            continue
        lines.append(line)
        for texts, count, value in zip(sequences, counts, values, strict=True):
            texts += value
            count.append(len(value))
    found.lines = lines
    found.columns = [
        Column(pa.array(texts, pa.large_string()), np.array(count, np.int64))
        for texts, count in zip(sequences, counts, strict=True)
    ]
    return found


def _sequences(text: Text, split: Split | None) -> list[bytes]:
    if isinstance(text, str):
        text = [text] if split is None else split(text)
    return [sequence.encode("utf-8") for sequence in text]


def text_offsets(texts: pa.LargeStringArray) -> np.ndarray:
    """Return the offsets of the texts in the array's buffer, and the end of the last, [texts + 1] int64."""
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _utf8_bytes(texts: pa.LargeStringArray) -> int:
    if not len(texts):
        return 0
    offsets = text_offsets(texts)
    return int(offsets[-1] - offsets[0])
