"""Datasets: content-addressed caches, sample orders, joined sentences, mock data, and id validation."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.config.schema import DataConfig
from megatron_slm.corpus.index import read_index
from megatron_slm.data.datasets import Datasets, build_datasets, check_corpora
from megatron_slm.data.index_cache import cached_arrays
from megatron_slm.data.overlap import ReadSamples, order_overlap
from megatron_slm.data.sample_locations import label_ranges
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.corpus_files import build
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.tokenizers.tokenizer import ByteTokenizer, NullTokenizer, Tokenizer, TokenizerFiles

LENGTH = 8
BYTES = ByteTokenizer(TokenizerFiles())


def built(
    data: DataConfig, samples: int = 20, *, valid: int = 0, seed: int = 3, tokenizer: Tokenizer = BYTES
) -> Datasets:
    return build_datasets(
        data, tokenizer=tokenizer, seq_length=LENGTH, train_samples=samples, valid_samples=valid, seed=seed
    )


def read(dataset: Any, count: int = 20) -> list[list[int]]:
    return [dataset[index]["tokens"].tolist() for index in range(count)]


def numbered(prefix: Path, lengths: list[int], first: int = 0) -> str:
    """Write an int32 corpus of consecutive ids, which identify its tokens."""
    starts = np.cumsum([first, *lengths])
    return build(prefix, [[list(range(a, b))] for a, b in itertools.pairwise(starts)], np.int32)


NUMBERS = NullTokenizer(TokenizerFiles(vocab_size=100_000))


# Caches


def test_rebuilt_corpus_invalidates_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for equal size and modification time, and for a relative prefix in another directory."""
    cache = str(tmp_path / "cache")
    contents = [[5, 11, 24], [24, 11, 5], [39, 1]]
    for round, lengths in enumerate([*contents, *contents]):
        for name in ("one", "two"):
            (tmp_path / name).mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / name)
            numbered(Path("c"), lengths, first=0 if name == "one" else 50)
            for path in ("c.bin", "c.idx"):
                os.utime(path, ns=(10**18, 10**18))
            cached = read(built(DataConfig(data_path=["c"], data_cache_path=cache), tokenizer=NUMBERS).train)
            (tmp_path / f"fresh{round}{name}").mkdir()
            fresh = DataConfig(data_path=["c"], data_cache_path=str(tmp_path / f"fresh{round}{name}"))
            assert cached == read(built(fresh, tokenizer=NUMBERS).train)
            beside = read(built(DataConfig(data_path=["c"]), tokenizer=NUMBERS).train)
            assert beside == cached


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE: list[Callable[[Path], Any]] = [
    _cut,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(bytes(path.stat().st_size)),
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    Path.unlink,
    lambda path: (path.unlink(), path.mkdir()),
    lambda path: (path.unlink(), os.mkfifo(path)),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut", "empty", "zeros", "flipped", "missing", "directory", "pipe"])
def test_damaged_cache_file_is_a_miss(
    tmp_path: Path, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (numbered(tmp_path / name, [50, 60, 70]) for name in "ab")
    data = DataConfig(data_path=["1", a, "2", b], data_cache_path=str(tmp_path / "cache"))
    expected = read(built(data, tokenizer=NUMBERS).train)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2 * 4 + 3
    for path in files:
        before = path.read_bytes()
        damage(path)
        assert read(built(data, tokenizer=NUMBERS).train) == expected, path.name
        if path.is_file():
            assert path.read_bytes() == before, "it was written again"
        else:
            assert "--data-cache-path" in capsys.readouterr().err
            path.unlink() if path.is_fifo() else path.rmdir()


def test_cache_entry_of_other_data_is_a_miss(tmp_path: Path) -> None:
    for number in (1, 2):
        arrays = cached_arrays(
            str(tmp_path), "key", f"data {number}", ["a"], lambda number=number: (np.array([number]),)
        )
        assert arrays[0].tolist() == [number]


def test_unwritable_cache_falls_back_to_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = numbered(tmp_path / "a", [50, 60, 70])
    (tmp_path / "a").write_text("a file, so that nothing can be written below it")
    data = DataConfig(data_path=[prefix], split="2,1,0")
    train = read(built(data, valid=2, tokenizer=NUMBERS).train)
    error = capsys.readouterr().err
    assert error.count("\n") == 1, "one warning for all sets"
    assert error.startswith("warning: --data-cache-path (sample indices)") and "cannot be written" in error
    assert train == read(built(replace(data, data_cache_path=str(tmp_path / "c")), valid=2).train)


def _ranks(rank: int, world_size: int, data: DataConfig) -> list[list[int]]:
    return read(built(data, tokenizer=NUMBERS).train)


def test_ranks_agree_without_a_cache(tmp_path: Path) -> None:
    a, b = (numbered(tmp_path / name, [50, 60, 70]) for name in "ab")
    data = DataConfig(data_path=["1", a, "2", b])
    expected = read(built(data, tokenizer=NUMBERS).train)
    for path in (tmp_path / "a").rglob("*.npy"):
        _cut(path)
    for path in (tmp_path / "b").rglob("*.*"):
        path.unlink()
    os.truncate(next((tmp_path / "a").rglob("*.json")), 3)
    assert run_ranks(_ranks, 2, data) == [expected, expected]


# Corpora


@pytest.mark.parametrize("tail", [True, False])
def test_ids_outside_the_vocabulary_are_rejected(tmp_path: Path, tail: bool) -> None:
    """Also if the metadata declares a larger vocabulary, and after the first million tokens."""
    ids = [7] * 1_500_000
    ids[-1 if tail else 3] = 300
    prefix = build(tmp_path / "c", [[ids]])
    with pytest.raises(ConfigError, match="contains the token id 300, but the vocabulary of ByteTokenizer has 257"):
        check_corpora(DataConfig(data_path=[prefix]), BYTES)


@pytest.mark.parametrize("token", [300, -1])
def test_id_outside_the_vocabulary_stops_the_run_when_it_is_read(tmp_path: Path, token: int) -> None:
    documents = [[[7] * 40], [[7] * 30 + [token] + [7] * 9], [[7] * 40]]
    prefix = build(tmp_path / "c", documents, np.int32)
    with pytest.raises(ConfigError, match=rf"c: a document among the sequences .* has the token id {token}"):
        read(built(DataConfig(data_path=[prefix], split="1,0,0")).train)


def test_sentences_are_rejected_joined_or_separate(tmp_path: Path) -> None:
    documents = [[[10 * document + sentence] * 3 for sentence in range(4)] for document in range(12)]
    prefix = build(tmp_path / "c", [*documents, []])
    with pytest.raises(ConfigError, match=r"--data-path .*several sequences.*--slm-sentences join"):
        check_corpora(DataConfig(data_path=[prefix]), BYTES)
    for sentences in ("join", "separate"):
        data = DataConfig(data_path=[prefix], split="1,0,0", slm_sentences=sentences)
        check_corpora(data, BYTES)
        train: Any = built(data, 17).train
        followers = {pair for sample in read(train, 17) for pair in itertools.pairwise(sample)}
        inside = {(a, b) for a, b in followers if a != b and b != a + 1 and a % 10 != 3}
        assert bool(inside) == (sentences == "separate"), "a sentence that is not the last has another behind it"
        tokens = np.memmap(f"{prefix}.bin", np.uint16)
        for index in range(17):
            places = [place for start, stop in label_ranges(train, index) for place in range(start, stop)]
            assert tokens[places].tolist() == train[index]["labels"].tolist()


def test_repeated_corpus_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "a", [40] * 10)
    numbered(tmp_path / "b", [40] * 10, first=1000)
    for end in (".bin", ".idx"):
        Path(f"link{end}").symlink_to(f"a{end}")
        os.link(f"a{end}", f"hard{end}")
    for other in ("a", "./a", str(tmp_path / "a"), "link", "hard"):
        data = DataConfig(data_path=["1", "a", "2", "b", "1", other], split="1,0,0")
        train = built(data, 40, tokenizer=NUMBERS).train
        counts = Counter(token for sample in read(train, 40) for token in sample)
        assert max(counts.values()) == 1
        assert sum(count for token, count in counts.items() if token < 1000) == 20 * LENGTH
        with pytest.raises(ConfigError, match="is named twice"):
            built(DataConfig(data_path=["a", "b", other], split="1,0,0"), tokenizer=NUMBERS)


# Splits


def test_default_split_matches_megatron_lm_with_and_without_evaluation(tmp_path: Path) -> None:
    prefix = numbered(tmp_path / "a", [100] * 100)
    per_epoch = 97 * 100 // LENGTH
    for valid in (0, 4):
        data = built(DataConfig(data_path=[prefix]), per_epoch - 1, valid=valid, tokenizer=NUMBERS)
        tokens = {token for sample in read(data.train, per_epoch - 1) for token in sample}
        assert max(tokens) < 97 * 100
        assert set(data.valid) == ({"valid"} if valid else set())
    beside = DataConfig(data_path=[prefix], valid_data_path={"own": [prefix]})
    train = built(beside, 1240, tokenizer=NUMBERS).train
    assert max(token for sample in read(train, 1240) for token in sample) > 9_900


# Orders


def seen(train: Any, first: int, last: int) -> Counter[int]:
    return Counter(token for index in range(first, last) for token in train[index]["labels"].tolist())


def test_stable_order_reads_each_epoch_once_and_is_independent_of_run_length(tmp_path: Path) -> None:
    prefix = numbered(tmp_path / "a", [13, 50, 1, 70, 30, 9, 40])  # 213 tokens: 26 samples
    data = DataConfig(data_path=[prefix], split="1,0,0", data_order="stable")
    short: Any = built(data, 20, tokenizer=NUMBERS).train
    long: Any = built(data, 100, tokenizer=NUMBERS).train
    assert read(long, 20) == read(short, 20)
    assert len(long) >= 100
    orders = []
    for epoch in range(3):
        counts = seen(long, 26 * epoch, 26 * (epoch + 1))
        assert set(counts.values()) == {1} and len(counts) == 26 * LENGTH
        orders.append(read(long, 26 * (epoch + 1))[26 * epoch :])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert read(built(data, 20, seed=4, tokenizer=NUMBERS).train) != read(short)
    tokens = np.memmap(f"{prefix}.bin", np.int32)
    for index in range(100):
        places = [place for start, stop in label_ranges(long, index) for place in range(start, stop)]
        assert tokens[places].tolist() == long[index]["labels"].tolist()


def test_stable_order_shuffles_the_samples_of_a_document(tmp_path: Path) -> None:
    data = DataConfig(data_path=[numbered(tmp_path / "a", [213])], split="1,0,0", data_order="stable")
    first_tokens = [tokens[0] for tokens in read(built(data, 26, tokenizer=NUMBERS).train, 26)]
    assert sorted(first_tokens) == list(range(0, 26 * LENGTH, LENGTH)) != first_tokens


def test_stable_order_of_a_blend_is_independent_of_run_length(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a", [90] * 3), numbered(tmp_path / "b", [45] * 3, first=1000)
    data = DataConfig(data_path=["1", a, "3", b], split="1,0,0", data_order="stable")
    short, long = (built(data, count, tokenizer=NUMBERS).train for count in (50, 300))
    assert read(long, 50) == read(short, 50)
    megatron = DataConfig(data_path=["1", a, "3", b], split="1,0,0")
    short, long = (built(megatron, count, tokenizer=NUMBERS).train for count in (50, 300))
    assert read(long, 50) != read(short, 50), "as in Megatron-LM"


def test_stable_order_requires_a_sample_per_epoch(tmp_path: Path) -> None:
    data = DataConfig(data_path=[numbered(tmp_path / "a", [LENGTH])], split="1,0,0", data_order="stable")
    with pytest.raises(ConfigError, match="8 tokens are too few for one sample"):
        built(data, tokenizer=NUMBERS)


# Mock data


def test_mock_data_is_reproducible_without_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_corpora(DataConfig(mock_data=True), BYTES)
    first, again = (built(DataConfig(mock_data=True), valid=5) for _ in range(2))
    assert read(first.train) == read(again.train) and read(first.valid["valid"], 5) == read(again.valid["valid"], 5)
    assert read(built(DataConfig(mock_data=True), seed=4).train) != read(first.train)
    assert max(map(max, read(first.train))) < BYTES.vocab_size
    assert [row.samples for row in first.usage()] == [20]
    assert not list(tmp_path.iterdir())


def test_index_is_validated_before_training(tmp_path: Path) -> None:
    prefix = build(tmp_path / "c", [[[1, 2, 3]], [[4, 5]], [[6]]])
    content = Path(f"{prefix}.idx").read_bytes()
    index = read_index(prefix)
    lengths = 34
    for place, value, kind, message in (
        (lengths + 4, 3, np.int32, "its index requires"),
        (lengths + 12 + 8, 2, np.int64, "offsets are not the sums of the lengths"),
        (lengths + 12 + 24 + 8, 9, np.int64, "documents start outside the corpus"),
        (lengths + 12 + 24 + 16, 0, np.int64, "documents end before they start"),
    ):
        changed = bytearray(content)
        changed[place : place + np.dtype(kind).itemsize] = np.array([value], kind).tobytes()
        Path(f"{prefix}.idx").write_bytes(changed)
        with pytest.raises(ConfigError, match=message):
            check_corpora(DataConfig(data_path=[prefix]), BYTES)
    changed = bytearray(content)
    changed[lengths : lengths + 8] = np.array([-1, 6], np.int32).tobytes()
    Path(f"{prefix}.idx").write_bytes(changed)
    with pytest.raises(ConfigError, match="negative lengths"):
        check_corpora(DataConfig(data_path=[prefix]), BYTES)
    assert index.sequences == 3


# Overlap of orders


def counted(before: Any, consumed: int, after: Any, stop: int) -> int:
    """Tokens read before are identified by their ids, which are unique."""
    read_before = set(seen(before, 0, consumed))
    return sum(count for token, count in seen(after, consumed, stop).items() if token in read_before)


@pytest.mark.parametrize("order", ["megatron", "stable"])
def test_overlap_counts_tokens_read_before(tmp_path: Path, order: str) -> None:
    a, b = numbered(tmp_path / "a", [13, 50, 1, 70, 30, 9, 40]), numbered(tmp_path / "b", [45] * 5, first=1000)
    alone = DataConfig(data_path=[a], split="1,0,0", data_order=order)
    blend = DataConfig(data_path=["1", a, "1", b], split="1,0,0", data_order=order)
    for before, first, after, second, consumed, stop in (
        (alone, (20, 3), alone, (100, 3), 20, 26),
        (alone, (20, 3), alone, (20, 4), 10, 20),
        (alone, (20, 3), blend, (60, 3), 20, 60),
        (blend, (60, 3), alone, (60, 3), 30, 60),
        (blend, (40, 3), blend, (200, 3), 40, 70),
        (alone, (90, 3), alone, (150, 3), 90, 100),
    ):
        old, new = (
            built(data, samples, seed=seed, tokenizer=NUMBERS).train
            for data, (samples, seed) in ((before, first), (after, second))
        )
        found = order_overlap([ReadSamples(old, 0, consumed)], new, consumed, stop)
        assert (found.tokens, found.seen) == ((stop - consumed) * LENGTH, counted(old, consumed, new, stop))
        assert found.is_exact
    assert order == "megatron" or order_overlap([ReadSamples(old, 0, 90)], new, 90, 90).tokens == 0


def test_overlap_counts_tokens_of_several_orders_once(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a", [13, 50, 1, 70, 30, 9, 40]), numbered(tmp_path / "b", [45] * 5, first=1000)
    alone = DataConfig(data_path=[a], split="1,0,0")
    blend = DataConfig(data_path=["1", a, "1", b], split="1,0,0")
    orders: list[Any] = [
        built(data, samples, seed=seed, tokenizer=NUMBERS).train
        for data, samples, seed in ((alone, 60, 3), (blend, 60, 3), (blend, 60, 4), (alone, 60, 5))
    ]
    bounds = [0, 10, 25, 30]
    parts = list(itertools.starmap(ReadSamples, zip(orders, bounds, bounds[1:], strict=False)))
    read_before = set().union(*(seen(part.dataset, part.first, part.stop) for part in parts))
    expected = sum(count for token, count in seen(orders[3], 30, 50).items() if token in read_before)
    found = order_overlap(iter(parts), orders[3], 30, 50)
    assert (found.tokens, found.seen) == (20 * LENGTH, expected)
    assert expected > order_overlap(parts[2:], orders[3], 30, 50).seen > 0
