"""Encodes blocks of documents to the bytes of a corpus: what a worker process does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_slm.data.preprocessing.documents import Block, Values, documents_in, is_blank
from megatron_slm.data.preprocessing.inputs import Form
from megatron_slm.data.preprocessing.text_reader import SHOWN_ERRORS, UNREADABLE, Text, TextReader, reason_of

LONGEST_SEQUENCE = (1 << 31) - 1  # tokens: .idx holds lengths as int32


@dataclass
class EncodedColumn:
    """The documents of one JSON key, back to back."""

    ids: list[bytes] = field(default_factory=list)  # of the corpus' dtype
    lengths: list[int] = field(default_factory=list)  # tokens of each sequence
    sequences: list[int] = field(default_factory=list)  # of each document; 0: it gave no token


@dataclass
class EncodedBlock:
    """What becomes of a block. Numbers of tokens are over all keys."""

    ids: tuple[bytes, ...] = ()  # by key
    lengths: tuple[bytes, ...] = ()  # by key: int32 of each sequence
    sequences: tuple[bytes, ...] = ()  # by key: int32 of each document
    lines: int = 0  # or rows
    documents: int = 0
    empty: int = 0  # documents without a token
    blank_lines: int = 0
    text_bytes: int = 0  # of the texts as UTF-8
    skipped: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)  # the first ones: line in the block, what is wrong


class BlockEncoder:
    """Encodes the documents of a block as Megatron-LM's preprocessing does.

    A document is one sequence, or one per sentence (``split``, or a JSON list of texts); a text without tokens is no
    sequence; the end-of-document token ends the last sequence of a document that has one.

    Args:
        read: reads the texts of a document.
        encode: from a text to its ids as bytes of ``dtype``.
        dtype: of the corpus.
        eod: the id that ends a document, or None.
        split: from a text to its sentences, or None.
    """

    def __init__(
        self,
        read: TextReader,
        encode: Callable[[str], bytes],
        dtype: np.dtype,
        eod: int | None = None,
        split: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.read, self.encode, self.split = read, encode, split
        self.keys = read.keys
        self.width = dtype.itemsize
        self.eod = None if eod is None else np.array([eod], dtype).tobytes()

    def __call__(self, block: Block) -> EncodedBlock:
        """
        Raises:
            ConfigError: the file has changed, or the encoder found itself wrong.
        """
        done = EncodedBlock()
        columns = [EncodedColumn() for _ in self.keys]
        content = block.load()
        done.lines = block.lines(content)
        if block.damage:
            done.skipped, done.bad = 1, [(0, f"the file is {block.damage}")]
        else:
            for line, document in documents_in(content, block.part.form, self.keys):
                if isinstance(document, bytes) and is_blank(document):
                    done.blank_lines += 1
                else:
                    self._add(document, block.part.form is Form.JSON, line, columns, done)
        done.ids = tuple(b"".join(column.ids) for column in columns)
        done.lengths = tuple(np.array(column.lengths, np.int32).tobytes() for column in columns)
        done.sequences = tuple(np.array(column.sequences, np.int32).tobytes() for column in columns)
        return done

    def _add(
        self, document: Values | bytes, is_json: bool, line: int, columns: list[EncodedColumn], done: EncodedBlock
    ) -> None:
        try:
            texts = self.read(document, is_json)
            encoded = [self._encode(text) for text in texts]
        except UNREADABLE as error:
            done.skipped += 1
            if len(done.bad) < SHOWN_ERRORS:
                done.bad.append((line, reason_of(error)))
            return
        done.documents += 1
        done.empty += not any(lengths for _, lengths in encoded)
        done.text_bytes += sum(_utf8_bytes(text) for text in texts)
        for column, (ids, lengths) in zip(columns, encoded, strict=True):
            column.ids += ids
            column.lengths += lengths
            column.sequences.append(len(lengths))

    def _encode(self, text: Text) -> tuple[list[bytes], list[int]]:
        pieces: list[bytes] = []
        lengths: list[int] = []
        for sequence in self._sequences(text):
            if ids := self.encode(sequence):
                pieces.append(ids)
                lengths.append(len(ids) // self.width)
        if pieces and self.eod is not None:
            pieces.append(self.eod)
            lengths[-1] += 1
        if max(lengths, default=0) > LONGEST_SEQUENCE:
            raise ValueError(f"{max(lengths):,} tokens in one sequence, more than .idx files can tell (2^31 - 1)")
        return pieces, lengths

    def _sequences(self, text: Text) -> list[str]:
        if isinstance(text, list):
            return text
        return [text] if self.split is None else self.split(text)


def _utf8_bytes(text: Text) -> int:
    if isinstance(text, list):
        return sum(map(_utf8_bytes, text))
    return len(text) if text.isascii() else len(text.encode("utf-8"))
