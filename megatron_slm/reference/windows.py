"""Scoring windows over the documents of a corpus, or over the corpus as one text.

A text of n tokens is covered by windows of w tokens with stride s. The first window scores all of its tokens, each
later window its last s. Each token is therefore scored once, with its complete preceding text or at least w − s + 1
tokens of it as input. The input before the first token of a text is the end-of-document token, as in training. The
first token of an example of fine-tuning is never a label and is not scored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_slm.corpus.checks import CorpusInfo
from megatron_slm.corpus.index import read_index
from megatron_slm.data.batches import MicroBatch
from megatron_slm.data.packing import best_fit
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.sidecar import EXAMPLE, ContextRule

CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a corpus in one window, of which [first, stop) are scored."""

    start: int
    first: int
    stop: int
    opens_text: bool  # the input before ``start`` is the end-of-document token

    def __len__(self) -> int:
        return self.stop - self.start


Row = list[Span]  # spans packed into one sequence of a micro-batch, masked from each other


def span_count(length: int, rule: ContextRule) -> int:
    """Return the number of windows that cover a text of ``length`` tokens."""
    return 1 + max(0, -(-(length - rule.window) // rule.stride))


def span(text_start: int, text_stop: int, number: int, rule: ContextRule) -> Span:
    """Return the span of window ``number`` over the text [text_start, text_stop) of a corpus."""
    start = text_start + number * rule.stride
    first = start + rule.window - rule.stride if number else start
    return Span(start, first, min(start + rule.window, text_stop), number == 0 and rule.kind != EXAMPLE)


class RowSource(Protocol):
    """Provide the rows of a corpus by chunk, independently of the number of ranks."""

    chunks: int
    packed: bool  # whether a row may contain several spans

    def rows(self, chunk: int) -> list[Row]: ...


class StreamRows:
    """Treat the corpus as one text: the context of a token may include earlier documents."""

    packed = False

    def __init__(self, tokens: int, rule: ContextRule, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.tokens, self.rule = tokens, rule
        self.windows = span_count(tokens, rule)
        self.per_chunk = max(1, chunk_tokens // rule.stride)
        self.chunks = -(-self.windows // self.per_chunk)

    def rows(self, chunk: int) -> list[Row]:
        """Return the windows of a chunk, one per row."""
        numbers = range(chunk * self.per_chunk, min((chunk + 1) * self.per_chunk, self.windows))
        return [[span(0, self.tokens, number, self.rule)] for number in numbers]


class Documents:
    """Positions of the documents of a corpus, read from its index on demand, since it may contain billions."""

    def __init__(self, corpus: CorpusInfo) -> None:
        index = read_index(corpus.prefix)
        self.pointers, self.sequences = index.pointers, index.boundaries
        self.tokens, self.width, self.count = corpus.tokens, corpus.dtype.itemsize, corpus.documents

    def start(self, document: int) -> int:
        """Return the position of a document's first token; for ``document == count`` the end of the corpus."""
        sequence = int(self.sequences[document])
        return int(self.pointers[sequence]) // self.width if sequence < len(self.pointers) else self.tokens

    def starting_in(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (first, end) positions of the non-empty documents that start in [start, stop)."""
        document = bisect_left(range(self.count), start, key=self.start)
        while document < self.count and (first := self.start(document)) < stop:
            document += 1
            if (end := self.start(document)) > first:
                yield first, end


class DocumentRows:
    """Treat every document as a separate text: the context of a token is limited to its document.

    With the context "example", a text starts at the second token of its document. Spans of several documents share a
    row. A document belongs to the chunk that contains its first token.
    """

    packed = True

    def __init__(self, documents: Documents, rule: ContextRule, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.documents, self.rule, self.chunk_tokens = documents, rule, chunk_tokens
        self.chunks = -(-documents.tokens // chunk_tokens)

    def rows(self, chunk: int) -> list[Row]:
        """Return the packed spans of a chunk's documents."""
        skipped = int(self.rule.kind == EXAMPLE)
        texts = self.documents.starting_in(chunk * self.chunk_tokens, (chunk + 1) * self.chunk_tokens)
        spans = [
            span(start, stop, number, self.rule)
            for start, stop in ((start + skipped, stop) for start, stop in texts)
            if start < stop
            for number in range(span_count(stop - start, self.rule))
        ]
        return pack(sorted(spans, key=len, reverse=True), self.rule.window)


def pack(spans: list[Span], window: int) -> list[Row]:
    """Pack spans into rows of at most ``window`` tokens with the best-fit algorithm, in the given order."""
    numbers = best_fit(map(len, spans), window).tolist()
    rows: list[Row] = [[] for _ in range(max(numbers, default=-1) + 1)]
    for number, each in zip(numbers, spans, strict=True):
        rows[number].append(each)
    return rows


def make_row_source(corpus: CorpusInfo, rule: ContextRule, chunk_tokens: int = CHUNK_TOKENS) -> RowSource:
    """Return the row source of a corpus for a context rule."""
    if rule.kind == "stream":
        return StreamRows(corpus.tokens, rule, chunk_tokens)
    return DocumentRows(Documents(corpus), rule, chunk_tokens)


def build_micro_batch(
    rows: Sequence[Row], ids: NDArray[Any], size: int, window: int, eod: int, *, packed: bool
) -> MicroBatch:
    """Return a micro-batch of ``size`` sequences of ``window`` tokens, padded with zeros.

    Args:
        rows: at most ``size`` rows.
        ids: token ids of the corpus (``.bin``).
        packed: mask the spans of a row from each other; otherwise a row has one span and attention is causal.
    """
    tokens, labels, texts = (np.zeros((size, window), np.int64) for _ in range(3))
    positions = np.tile(np.arange(window), (size, 1))
    for row, spans in enumerate(rows):
        column = 0
        for number, each in enumerate(spans):
            here = slice(column, column + len(each))
            labels[row, here] = ids[each.start : each.stop]
            tokens[row, here] = np.roll(labels[row, here], 1)
            tokens[row, column] = eod if each.opens_text else ids[each.start - 1]
            positions[row, here] = np.arange(len(each))
            texts[row, here] = number
            column = here.stop
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.ones(size, window, dtype=torch.bool),
        position_ids=torch.from_numpy(positions),
        sample_index=torch.arange(size),
        first_sample=0,
        documents=torch.from_numpy(texts) if packed else None,
    )


def check_ids(rows: Sequence[Row], ids: NDArray[Any], vocab_size: int, prefix: str) -> None:
    """Raise ConfigError if a token of the rows is outside the vocabulary, which a GPU would report without its place.

    Args:
        ids: token ids of the corpus ``prefix``.
    """
    for each in (each for spans in rows for each in spans):
        start = each.start if each.opens_text else each.start - 1
        wrong = np.flatnonzero((ids[start : each.stop] < 0) | (ids[start : each.stop] >= vocab_size))
        if len(wrong):
            position = start + int(wrong[0])
            raise ConfigError(
                f"{prefix} has the token id {ids[position]} at position {position}, but the vocabulary has "
                f"{vocab_size} entries. Use the tokenizer that made the corpus; tools/inspect_dataset.py --check finds "
                "all such ids."
            )


def scored_positions(rows: Sequence[Row]) -> Iterator[tuple[int, slice, Span]]:
    """Yield (row, columns of the scored labels, span) for every span of a micro-batch."""
    for row, spans in enumerate(rows):
        column = 0
        for each in spans:
            yield row, slice(column + each.first - each.start, column + len(each)), each
            column += len(each)
