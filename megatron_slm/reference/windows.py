"""Scoring windows over the documents of a corpus, or over the corpus as one text.

A text of n tokens is covered by windows of w tokens that begin every s tokens. The first window scores all its tokens,
every later one its last s, so that each token is scored once, with all the text before it or at least w − s + 1
tokens of it. The input before the first token of a text is the end-of-document token, which is what a model sees
there in training.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_slm.corpus.checks import CorpusInfo
from megatron_slm.corpus.index import read_index
from megatron_slm.data.batches import MicroBatch
from megatron_slm.scores.sidecar import ContextRule

CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Span:
    """A piece of a text in one window: the labels [start, stop) of the corpus, scored from ``first`` on."""

    start: int
    first: int
    stop: int
    opens_text: bool  # the input before ``start`` is the end-of-document token

    def __len__(self) -> int:
        return self.stop - self.start


Row = list[Span]  # what one sequence of a micro-batch holds; no span sees another


def span_count(length: int, rule: ContextRule) -> int:
    """Windows that cover a text of ``length`` tokens."""
    return 1 + max(0, -(-(length - rule.window) // rule.stride))


def span(begin: int, end: int, number: int, rule: ContextRule) -> Span:
    """Window ``number`` of the text [begin, end) of a corpus."""
    start = begin + number * rule.stride
    first = start + rule.window - rule.stride if number else start
    return Span(start, first, min(start + rule.window, end), number == 0)


class RowSource(Protocol):
    """The rows that score a corpus, chunk by chunk; what a chunk holds does not depend on who scores it."""

    chunks: int
    packed: bool  # whether a row may hold several spans

    def rows(self, chunk: int) -> list[Row]: ...


class StreamRows:
    """The corpus as one text: a token sees the text before it, of any document."""

    packed = False

    def __init__(self, tokens: int, rule: ContextRule, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.tokens, self.rule = tokens, rule
        self.windows = span_count(tokens, rule)
        self.per_chunk = max(1, chunk_tokens // rule.stride)
        self.chunks = -(-self.windows // self.per_chunk)

    def rows(self, chunk: int) -> list[Row]:
        """The windows of a chunk, one a row."""
        numbers = range(chunk * self.per_chunk, min((chunk + 1) * self.per_chunk, self.windows))
        return [[span(0, self.tokens, number, self.rule)] for number in numbers]


class Documents:
    """Where the documents of a corpus begin, read from its index where needed: an index may hold billions."""

    def __init__(self, corpus: CorpusInfo) -> None:
        index = read_index(corpus.prefix)
        self.pointers, self.sequences = index.pointers, index.boundaries
        self.tokens, self.width, self.count = corpus.tokens, corpus.dtype.itemsize, corpus.documents

    def begin(self, document: int) -> int:
        """The place of the first token of a document; that of document ``count`` is the end of the corpus."""
        sequence = int(self.sequences[document])
        return int(self.pointers[sequence]) // self.width if sequence < len(self.pointers) else self.tokens

    def beginning_in(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """[begin, end) of the documents that begin at a place in [start, stop) and hold anything."""
        document = bisect_left(range(self.count), start, key=self.begin)
        while document < self.count and (begin := self.begin(document)) < stop:
            document += 1
            if (end := self.begin(document)) > begin:
                yield begin, end


class DocumentRows:
    """Every document is a text of its own: a token sees its own document alone.

    Spans of several documents share a row. Documents are dealt with by the chunk in which they begin.
    """

    packed = True

    def __init__(self, documents: Documents, rule: ContextRule, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.documents, self.rule, self.chunk_tokens = documents, rule, chunk_tokens
        self.chunks = -(-documents.tokens // chunk_tokens)

    def rows(self, chunk: int) -> list[Row]:
        """The spans of a chunk's documents, packed: each goes where it leaves the least room, the longest first."""
        texts = self.documents.beginning_in(chunk * self.chunk_tokens, (chunk + 1) * self.chunk_tokens)
        spans = [
            span(begin, end, number, self.rule)
            for begin, end in texts
            for number in range(span_count(end - begin, self.rule))
        ]
        return pack(sorted(spans, key=len, reverse=True), self.rule.window)


def pack(spans: list[Span], window: int) -> list[Row]:
    """Rows of at most ``window`` tokens, each span in the row that it fills best."""
    rows: list[Row] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for each in spans:
        place = bisect_left(rooms, (len(each), -1))
        if place == len(rooms):
            rows.append([])
            room, row = window, len(rows) - 1
        else:
            room, row = rooms.pop(place)
        rows[row].append(each)
        insort(rooms, (room - len(each), row))
    return rows


def make_row_source(corpus: CorpusInfo, rule: ContextRule, chunk_tokens: int = CHUNK_TOKENS) -> RowSource:
    """Return the rows of a corpus by ``rule``."""
    if rule.kind == "stream":
        return StreamRows(corpus.tokens, rule, chunk_tokens)
    return DocumentRows(Documents(corpus), rule, chunk_tokens)


def as_micro_batch(
    rows: Sequence[Row], ids: NDArray[Any], size: int, window: int, eod: int, *, packed: bool
) -> MicroBatch:
    """``rows`` as one micro-batch of ``size`` sequences of ``window`` tokens; what no span fills is zero.

    Args:
        rows: at most ``size``.
        ids: the whole corpus, as ``.bin`` holds it.
        packed: mask the spans of a row from each other; without it a row holds one span, and attention is causal.
    """
    tokens, labels, text = (np.zeros((size, window), np.int64) for _ in range(3))
    positions = np.tile(np.arange(window), (size, 1))
    for row, spans in enumerate(rows):
        column = 0
        for number, each in enumerate(spans):
            here = slice(column, column + len(each))
            labels[row, here] = ids[each.start : each.stop]
            tokens[row, here] = np.roll(labels[row, here], 1)
            tokens[row, column] = eod if each.opens_text else ids[each.start - 1]
            positions[row, here] = np.arange(len(each))
            text[row, here] = number
            column = here.stop
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.ones(size, window, dtype=torch.bool),
        position_ids=torch.from_numpy(positions),
        sample_index=torch.arange(size),
        first_sample=0,
        attention_mask=_mask(torch.from_numpy(text)) if packed else None,
    )


def _mask(text: Tensor) -> Tensor:
    """[b, 1, w, w] bool, True where attention is forbidden: to later tokens and to other texts; text [b, w]."""
    later = torch.ones(text.size(1), text.size(1), dtype=torch.bool).triu(1)
    return (later | (text[:, :, None] != text[:, None, :]))[:, None]


def scored_places(rows: Sequence[Row]) -> Iterator[tuple[int, slice, Span]]:
    """(row, columns of the scored labels, span) of every span of a micro-batch."""
    for row, spans in enumerate(rows):
        column = 0
        for each in spans:
            yield row, slice(column + each.first - each.start, column + len(each)), each
            column += len(each)
