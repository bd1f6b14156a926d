"""Codebooks: the error bound holds for every value of every id, and they are finer where an id's own losses lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.data.scores.code import ScoreCode
from megatron_slm.data.scores.codebooks import CODES, Codebooks, TokenCode, fit, loss_code


def a_code(vocab_size: int, width: int = 1) -> TokenCode:
    code = loss_code(vocab_size, width)
    assert isinstance(code, TokenCode)
    return code


def fitted(code: TokenCode, values: np.ndarray, labels: np.ndarray) -> Codebooks:
    counts = np.zeros((code.vocab_size, code.bins), np.int32)
    code.count(counts, values.astype(np.float32), labels)
    assert counts.sum() == values.size
    return fit(code, counts)


def skewed(chance: np.random.Generator, code: TokenCode, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses of ids of very different frequency, each around a place of its own, some of them above the ceiling."""
    labels = (code.vocab_size * chance.random(count) ** 3).astype(np.int64)
    centre = np.random.default_rng(1).uniform(0, code.ceiling, code.vocab_size)
    return np.abs(centre[labels] + chance.normal(0, 1, count)).astype(np.float32), labels


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2000), st.integers(0, 2**32 - 1))
def test_the_error_is_within_the_bound(vocab_size: int, sample: int, seed: int) -> None:
    """Whatever they were fitted to; also for the ends, for every edge of a bin, and its neighbours in fp32."""
    code, chance = a_code(vocab_size), np.random.default_rng(seed)
    books = fitted(code, *skewed(chance, code, sample))
    edges = (np.arange(code.bins + 1) * code.ceiling / code.bins).astype(np.float32)
    values = np.concatenate([edges, np.nextafter(edges, 0), chance.uniform(0, code.ceiling, 300)]).astype(np.float32)
    values = np.minimum(values, np.float32(code.ceiling))
    labels = chance.integers(0, vocab_size, values.size)
    errors = np.abs(books.decode(books.encode(values, labels), labels).astype(np.float64) - values)
    assert errors.max() <= code.max_error


def test_the_bound_is_reached() -> None:
    """A bound that is far too wide would also hold: losses of one place leave the fewest codes to all others."""
    code = a_code(5)
    books = fitted(code, np.full(100_000, 1.0), np.zeros(100_000, np.int64))
    values, labels = np.linspace(0, code.ceiling, 9999).astype(np.float32), np.zeros(9999, np.int64)
    errors = np.abs(books.decode(books.encode(values, labels), labels) - values)
    assert 0.95 * code.max_error < errors.max() <= code.max_error


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_every_code_stands_for_itself_and_the_order_is_kept(vocab_size: int, seed: int) -> None:
    code, chance = a_code(vocab_size), np.random.default_rng(seed)
    books = fitted(code, *skewed(chance, code, 1000))
    labels, codes = np.meshgrid(np.arange(vocab_size), np.arange(CODES, dtype=np.uint8), indexing="ij")
    values = books.decode(codes, labels)
    assert np.array_equal(books.encode(values, labels), codes)
    assert np.all(np.diff(values, axis=1) > 0)
    ascending = np.sort(chance.uniform(0, 2 * code.ceiling, 100)).astype(np.float32)
    own = np.full(100, vocab_size - 1)
    assert np.all(np.diff(books.encode(ascending, own).astype(int)) >= 0)
    assert set(books.encode(ascending[ascending >= code.ceiling], own[ascending >= code.ceiling])) <= {CODES - 1}


def test_codes_lie_where_the_losses_do() -> None:
    """Held-out losses: much closer than on one curve for all, for frequent ids and for those never seen."""
    code, chance = a_code(2000), np.random.default_rng(3)
    books = fitted(code, *skewed(chance, code, 100_000))
    values, labels = skewed(chance, code, 50_000)
    below = values <= code.ceiling
    values, labels = values[below], labels[below]
    curve = ScoreCode(1, code.ceiling)
    one = np.abs(curve.decode(curve.encode(values)) - values)
    own = np.abs(books.decode(books.encode(values, labels), labels) - values)
    assert own.mean() < 0.5 * one.mean()


def test_a_rare_id_gets_what_rare_ids_need() -> None:
    """Frequent ids are easy here and rare ones hard: an id that was never seen is coded as the rare ones are."""
    code = a_code(1000)
    labels = np.concatenate([np.repeat(np.arange(10), 1000), np.arange(10, 900)])
    values = np.where(labels < 10, 0.1, 9.0)
    books = fitted(code, values, labels)
    unseen = np.full(1, 950)
    hard, easy = (
        abs(float(books.decode(books.encode(at, unseen), unseen)[0] - at[0]))
        for at in (np.array([9.03], np.float32), np.array([0.13], np.float32))
    )
    codes_there = np.diff(books.starts[950].astype(int), append=CODES)
    assert codes_there[int(9.0 / code.ceiling * code.bins)] > 5 * codes_there[0] > 0
    assert hard < 0.02 and easy <= code.max_error


def test_large_counts_and_an_empty_sample() -> None:
    code = a_code(300)
    empty = fit(code, np.zeros((300, code.bins), np.int32))
    assert np.array_equal(empty.starts[0], np.arange(code.bins) * (CODES // code.bins))
    books = fit(code, np.full((300, code.bins), 2**31 - 1, np.int32))
    assert np.array_equal(books.starts, empty.starts)


@pytest.mark.parametrize("shape", [(0, 32), (6, 32), (5, 31)])
def test_another_shape_is_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match="damaged codebooks"):
        Codebooks(a_code(5), np.zeros(shape, np.uint8))


def test_sizes() -> None:
    code = a_code(128_000)
    assert code.table_bytes == 4_096_000
    assert code.max_error < 0.124 and a_code(32_000).max_error < 0.113
