"""Test that scoring windows score every token once, with the correct text and at least the minimum context."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.corpus.checks import check_corpus
from megatron_slm.data.batches import document_mask
from megatron_slm.reference.windows import (
    Span,
    build_micro_batch,
    check_ids,
    make_row_source,
    pack,
    scored_positions,
    span,
    span_count,
)
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.sidecar import ContextRule
from megatron_slm.testing.numbered import write_numbered_corpus

EOD = 999


RULES = st.integers(1, 12).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window)))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=8),
    RULES,
    st.sampled_from(["document", "stream"]),
    st.integers(1, 40),
)
def test_every_token_is_scored_once_with_its_context(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    sizes: tuple[int, int],
    kind: str,
    chunk_tokens: int,
) -> None:
    if not any(map(sum, documents)):
        documents = [[1]]
    rule = ContextRule(kind, *sizes)
    prefix = write_numbered_corpus(tmp_path_factory.mktemp("windows") / "corpus", documents)
    corpus = check_corpus(prefix, "--data-path")
    ids = np.fromfile(f"{prefix}.bin", np.int32)
    starts = np.cumsum([0] + [sum(document) for document in documents]) if kind == "document" else np.zeros(1, int)
    source = make_row_source(corpus, rule, chunk_tokens)
    seen = np.zeros(corpus.tokens, int)
    for chunk in range(source.chunks):
        for row in source.rows(chunk):
            batch = build_micro_batch([row], ids, 2, rule.window, EOD, packed=source.packed)
            for line, columns, each in scored_positions([row]):
                seen[each.first : each.stop] += 1
                for column, place in zip(
                    range(*columns.indices(rule.window)), range(each.first, each.stop), strict=True
                ):
                    assert batch.labels[line, column] == place
                    start = starts[starts <= place].max()
                    visible = (
                        column + 1
                        if batch.documents is None
                        else int((~document_mask(batch.documents)[line, 0, column]).sum())
                    )
                    assert visible >= min(place - start + 1, rule.window - rule.stride + 1)
                    assert int(batch.position_ids[line, column]) == visible - 1
                    text = batch.tokens[line, column + 1 - visible : column + 1].tolist()
                    before = [EOD if token < start else token for token in range(place - visible, place)]
                    assert text == before
    assert np.all(seen == 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10), max_size=40))
def test_packing_keeps_every_span_within_the_window(lengths: list[int]) -> None:
    rule = ContextRule("document", 10, 10)
    ends = np.cumsum([0, *lengths]).tolist()
    spans = [span(start, stop, 0, rule) for start, stop in itertools.pairwise(ends)]
    rows = pack(sorted(spans, key=len, reverse=True), 10)
    assert all(sum(map(len, row)) <= 10 for row in rows)
    assert sorted(each.start for row in rows for each in row) == ends[:-1]
    assert len(rows) <= 2 * -(-sum(lengths) // 10)


def test_numbers_beyond_32_bits() -> None:
    """Span positions of a document with more than 2^31 tokens are exact."""
    rule, tokens = ContextRule("stream", 2048, 1024), 5 * 2**31 + 7
    last = span(0, tokens, span_count(tokens, rule) - 1, rule)
    assert last.stop == tokens and last.start == 1024 * (span_count(tokens, rule) - 1)
    assert last.first < tokens <= last.start + 2048


@pytest.mark.parametrize(("place", "token"), [(1, 10), (2, -1), (4, 10)])
def test_ids_outside_the_vocabulary_are_refused(place: int, token: int) -> None:
    """A GPU would end the process in a kernel, without the place."""
    ids = np.arange(8, dtype=np.int32)
    rows = [[Span(0, 0, 1, True)], [Span(2, 3, 5, False)]]
    check_ids(rows, ids, 10, "corpus")
    ids[[5, 7]] = 99  # in no row
    check_ids(rows, ids, 10, "corpus")
    ids[place] = token
    with pytest.raises(ConfigError, match=f"corpus has the token id {token} at position {place}, but the vocabulary"):
        check_ids(rows, ids, 10, "corpus")
