"""Corpus writer: indices identical to Megatron-Core's, including documents beyond 2^31 tokens and bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, _IndexWriter

from megatron_slm.corpus.index import read_index
from megatron_slm.preprocessing import corpus_writer
from megatron_slm.preprocessing.corpus_writer import CorpusWriter, corpus_dtype, write_index

LONGEST = 2**31 - 1


def compare(directory: Path, dtype: np.dtype, lengths: list[int], sequences: list[int]) -> None:
    np.array(lengths, np.int32).tofile(directory / "lengths")
    np.array(sequences, np.int32).tofile(directory / "sequences")
    write_index(directory / "ours.idx", dtype, directory / "lengths", directory / "sequences")
    with _IndexWriter(str(directory / "theirs.idx"), dtype.type) as writer:
        boundaries = [0, *(sum(sequences[: place + 1]) for place in range(len(sequences)))]
        writer.write(lengths, None, boundaries)
    assert (directory / "ours.idx").read_bytes() == (directory / "theirs.idx").read_bytes()


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
@pytest.mark.parametrize(
    ("lengths", "sequences"),
    [
        ([], []),
        ([], [0, 0]),
        ([LONGEST, 1, LONGEST, 7, LONGEST], [1, 0, 2, 2]),  # more than 2^32 tokens; a document of more than 2^33 bytes
        ([2**30, 5], [1, 1]),  # one sequence of 2^31 or 2^32 bytes
        ([LONGEST] * 40, [40]),  # one document of more than 2^36 tokens
    ],
)
def test_index_matches_megatron_core_beyond_32_bits(
    tmp_path: Path, vocab_size: int, lengths: list[int], sequences: list[int]
) -> None:
    compare(tmp_path, corpus_dtype(vocab_size), lengths, sequences)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, LONGEST), max_size=5), max_size=30), at_once=st.integers(1, 9))
def test_index_matches_megatron_core_for_any_lengths(tmp_path: Path, documents: list[list[int]], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_writer, "INDEX_CHUNK", at_once)
        lengths = [length for document in documents for length in document]
        compare(tmp_path, np.dtype(np.uint16), lengths, [len(document) for document in documents])


@pytest.mark.parametrize("vocab_size", [1, 256, 65499, 65500, 65536, 2**20])
def test_dtype_matches_megatron_core(vocab_size: int) -> None:
    assert corpus_dtype(vocab_size).type is DType.optimal_dtype(vocab_size)


def test_a_composed_corpus_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job records that it is complete before the files get their names."""
    synced: set[str] = set()
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(Path(f"/proc/self/fd/{file}").readlink().name))
    writer = CorpusWriter(str(tmp_path / "c"), np.dtype(np.uint16))
    writer.open()
    writer.append(
        *(np.array(values, kind).tobytes() for values, kind in (([5, 6, 7], "u2"), ([2, 1], "i4"), ([2], "i4")))
    )
    writer.compose()
    assert {"c.partial.bin", "c.partial.idx"} <= synced
    writer.publish()
    assert read_index(str(tmp_path / "c")).lengths.tolist() == [2, 1]
