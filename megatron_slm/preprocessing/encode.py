"""Encoding of document blocks to corpus bytes: the task of a worker process."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_slm.preprocessing.documents import Block
from megatron_slm.preprocessing.engines import Engine
from megatron_slm.preprocessing.text_reader import SHOWN_ERRORS, UNREADABLE, TextReader, describe_error
from megatron_slm.preprocessing.texts import Column, Split, Texts, read_block_texts

MAX_SEQUENCE = (1 << 31) - 1  # tokens: .idx stores lengths as int32


@dataclass
class EncodedBlock:
    """Hold the encoded documents and the counts of a block."""

    ids: tuple[bytes, ...] = ()  # by key
    lengths: tuple[bytes, ...] = ()  # by key: int32 tokens of each sequence
    sequences: tuple[bytes, ...] = ()  # by key: int32 sequences of each document
    lines: int = 0  # or rows
    documents: int = 0
    empty: int = 0  # documents without a token
    blank_lines: int = 0
    text_bytes: int = 0  # UTF-8 size of the texts
    skipped: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)  # first unreadable documents: line in the block, reason


@dataclass
class EncodedColumn:
    """Hold the concatenated documents of one key."""

    ids: np.ndarray  # [tokens] of the corpus dtype
    lengths: np.ndarray  # [sequences] tokens of each sequence
    sequences: np.ndarray  # [documents] sequences of each document; 0 if it has no tokens


class BlockEncoder:
    """Encode the documents of a block, with the same result as Megatron-LM's preprocessing.

    A document consists of one sequence, or of one per sentence (``split``, or a JSON list of texts). Texts without
    tokens are dropped, and the end-of-document token is appended to the last sequence of each document.

    Args:
        reader: extracts the texts of a document.
        engine: encodes texts to ids of the corpus dtype.
        eod: end-of-document id to append, or None.
        split: function from a text to its sentences, or None.
    """

    def __init__(self, reader: TextReader, engine: Engine, eod: int | None = None, split: Split | None = None) -> None:
        self.reader, self.engine, self.eod, self.split = reader, engine, eod, split

    def __call__(self, block: Block) -> EncodedBlock:
        """Encode a block.

        Raises:
            ConfigError: the file has changed, or the engine detected a wrong result.
        """
        content = block.load()
        if block.damage:
            empty = (b"",) * len(self.reader.keys)
            bad = [(0, f"the file is {block.damage}")]
            return EncodedBlock(empty, empty, empty, block.lines(content), skipped=1, bad=bad)
        texts = read_block_texts(content, block.chunk.input_format, self.reader, self.split)
        try:
            columns = [self._encode(column) for column in texts.columns]
        except UNREADABLE:
            texts = self._without_bad(texts)
            columns = [self._encode(column) for column in texts.columns]
        has_tokens = np.any([column.sequences > 0 for column in columns], axis=0)
        return EncodedBlock(
            ids=tuple(column.ids.tobytes() for column in columns),
            lengths=tuple(column.lengths.astype(np.int32).tobytes() for column in columns),
            sequences=tuple(column.sequences.astype(np.int32).tobytes() for column in columns),
            lines=block.lines(content),
            documents=len(texts),
            empty=len(texts) - int(has_tokens.sum()),
            blank_lines=texts.blank_lines,
            text_bytes=texts.bytes(),
            skipped=len(texts.bad),
            bad=sorted(texts.bad)[:SHOWN_ERRORS],
        )

    def _without_bad(self, texts: Texts) -> Texts:
        """Return the documents that can be encoded, and add the others to ``bad``."""
        good = []
        for place in range(len(texts)):
            try:
                for column in texts.columns:
                    self._encode(column.document(place))
                good.append(place)
            except UNREADABLE as error:
                texts.bad.append((texts.lines[place], describe_error(error)))
        return texts.select(good)

    def _encode(self, column: Column) -> EncodedColumn:
        ids, lengths = self.engine.encode(column.texts)
        if lengths.max(initial=0) >= MAX_SEQUENCE:
            raise ValueError(f"{lengths.max():,} tokens in one sequence; .idx files are limited to 2^31 - 1")
        documents = np.repeat(np.arange(len(column.counts)), column.counts)[lengths > 0]
        sequences = np.bincount(documents, minlength=len(column.counts))
        lengths = lengths[lengths > 0]
        if self.eod is not None:
            last = np.cumsum(sequences)[sequences > 0] - 1  # last sequence of each non-empty document
            ids = np.insert(ids, np.cumsum(lengths)[last], self.eod)
            lengths[last] += 1
        return EncodedColumn(ids, lengths, sequences)
