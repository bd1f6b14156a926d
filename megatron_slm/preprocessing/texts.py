"""The texts of a block as Arrow arrays: read by Arrow if every line is in order, else document by document.

A document has the same texts, or is bad for the same reason, whatever the other lines of its block: Arrow reads only
blocks of lines that are all in order, and :class:`TextReader` asks it about lines that Python's JSON reader refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from megatron_slm.preprocessing.arrow_columns import json_columns, table_columns
from megatron_slm.preprocessing.documents import documents_in, is_blank
from megatron_slm.preprocessing.inputs import Form
from megatron_slm.preprocessing.text_reader import UNREADABLE, Text, TextReader, reason_of

Split = Callable[[str], list[str]]


@dataclass
class Column:
    """The sequences of all documents under one key, back to back."""

    texts: pa.LargeStringArray
    counts: np.ndarray  # sequences of each document

    def document(self, place: int) -> Column:
        """Return the column of one document."""
        begin = int(self.counts[:place].sum())
        return Column(self.texts.slice(begin, int(self.counts[place])), self.counts[place : place + 1])


@dataclass
class Texts:
    """The documents of a block."""

    columns: list[Column]  # by key
    lines: Sequence[int]  # of each document, within the block
    blank_lines: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)  # line within the block, reason

    def __len__(self) -> int:
        return len(self.lines)

    def bytes(self) -> int:
        """Return the size of all texts as UTF-8."""
        return sum(_utf8_bytes(column.texts) for column in self.columns)

    def select(self, places: Sequence[int]) -> Texts:
        """Return some of the documents."""
        columns = []
        for column in self.columns:
            parts = [column.document(place) for place in places]
            arrays = [part.texts for part in parts] or [column.texts.slice(0, 0)]
            columns.append(Column(pa.concat_arrays(arrays), column.counts[list(places)]))
        return Texts(columns, [self.lines[place] for place in places], self.blank_lines, self.bad)


def texts_of_block(content: bytes, form: Form, reader: TextReader, split: Split | None) -> Texts:
    """Return the texts of a block, of which ``content`` is what ``Block.load`` gives.

    Args:
        content: lines, a text, or an Arrow stream.
        form: kind of the file.
        reader: reads the texts of a document.
        split: from a text to its sentences, each of which is a sequence then; None: a text, or each text of a list.
    """
    if split is None:
        arrays = {Form.JSON: json_columns, Form.TABLE: table_columns}.get(form, lambda *_: None)(content, reader.keys)
        if arrays is not None:
            ones = np.ones(len(arrays[0]), np.int64)
            return Texts([Column(array, ones) for array in arrays], range(len(arrays[0])))
    return _one_by_one(content, form, reader, split)


def _one_by_one(content: bytes, form: Form, reader: TextReader, split: Split | None) -> Texts:
    keys = reader.keys
    sequences: list[list[bytes]] = [[] for _ in keys]
    counts: list[list[int]] = [[] for _ in keys]
    found = Texts([], [])
    lines = []
    for line, document in documents_in(content, form, keys):
        if isinstance(document, bytes) and is_blank(document):
            found.blank_lines += 1
            continue
        try:
            values = [_sequences(text, split) for text in reader(document, form is Form.JSON)]
        except UNREADABLE as error:
            found.bad.append((line, reason_of(error)))
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
    """Return the first byte of each text in the array's buffer, and the end of the last, int64."""
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _utf8_bytes(texts: pa.LargeStringArray) -> int:
    if not len(texts):
        return 0
    offsets = text_offsets(texts)
    return int(offsets[-1] - offsets[0])
