"""Encodes blocks of documents to the bytes of a corpus: the work of a worker process."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_slm.preprocessing.documents import Block
from megatron_slm.preprocessing.engines import Engine
from megatron_slm.preprocessing.text_reader import SHOWN_ERRORS, UNREADABLE, TextReader, reason_of
from megatron_slm.preprocessing.texts import Column, Split, Texts, texts_of_block

LONGEST_SEQUENCE = (1 << 31) - 1  # tokens: .idx holds lengths as int32


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
    bad: list[tuple[int, str]] = field(default_factory=list)  # the first ones: line in the block, reason


@dataclass
class EncodedColumn:
    """The documents of one key, back to back."""

    ids: np.ndarray  # of the corpus' dtype
    lengths: np.ndarray  # tokens of each sequence
    sequences: np.ndarray  # of each document; 0: it gave no token


class BlockEncoder:
    """Encodes the documents of a block as Megatron-LM's preprocessing does.

    A document is one sequence, or one per sentence (``split``, or a JSON list of texts); a text without tokens is no
    sequence; the end-of-document token ends the last sequence of a document that has one.

    Args:
        reader: reads the texts of a document.
        engine: encodes texts to ids of the corpus' dtype.
        eod: the id that ends a document, or None.
        split: from a text to its sentences, or None.
    """

    def __init__(self, reader: TextReader, engine: Engine, eod: int | None = None, split: Split | None = None) -> None:
        self.reader, self.engine, self.eod, self.split = reader, engine, eod, split

    def __call__(self, block: Block) -> EncodedBlock:
        """
        Raises:
            ConfigError: the file has changed, or the engine found itself wrong.
        """
        content = block.load()
        if block.damage:
            empty = (b"",) * len(self.reader.keys)
            bad = [(0, f"the file is {block.damage}")]
            return EncodedBlock(empty, empty, empty, block.lines(content), skipped=1, bad=bad)
        texts = texts_of_block(content, block.part.form, self.reader, self.split)
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
        """Return the documents that can be encoded; the others are noted with their reason."""
        good = []
        for place in range(len(texts)):
            try:
                for column in texts.columns:
                    self._encode(column.document(place))
                good.append(place)
            except UNREADABLE as error:
                texts.bad.append((texts.lines[place], reason_of(error)))
        return texts.select(good)

    def _encode(self, column: Column) -> EncodedColumn:
        ids, lengths = self.engine.encode(column.texts)
        if lengths.max(initial=0) >= LONGEST_SEQUENCE:
            raise ValueError(f"{lengths.max():,} tokens in one sequence, more than .idx files can tell (2^31 - 1)")
        documents = np.repeat(np.arange(len(column.counts)), column.counts)[lengths > 0]
        sequences = np.bincount(documents, minlength=len(column.counts))
        lengths = lengths[lengths > 0]
        if self.eod is not None:
            last = np.cumsum(sequences)[sequences > 0] - 1  # sequence of each document that has one
            ids = np.insert(ids, np.cumsum(lengths)[last], self.eod)
            lengths[last] += 1
        return EncodedColumn(ids, lengths, sequences)
