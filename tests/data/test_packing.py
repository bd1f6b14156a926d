"""Packing of examples: capacity, order, and the content of samples compared with their examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_slm.config.schema import DataConfig
from megatron_slm.corpus.loss_masks import mask_path, write_mask
from megatron_slm.data.batches import document_mask
from megatron_slm.data.datasets import build_datasets, check_loss_masks
from megatron_slm.data.packing import best_fit
from megatron_slm.data.sample_locations import label_ranges
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.numbered import write_numbered_corpus
from megatron_slm.tokenizers.tokenizer import NullTokenizer, TokenizerFiles

LENGTH, VOCABULARY = 16, 1000
EOD = VOCABULARY - 1


@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit(lengths: list[int]) -> None:
    packs = best_fit(lengths, 20)
    sizes = np.bincount(packs, weights=lengths) if lengths else np.zeros(0)
    assert (sizes <= 20).all() and (sizes > 0).all()
    assert (sizes <= 10).sum() <= 1, "two such packs would have been one"
    expected, free = [], list[int]()  # the definition: the fullest pack with enough space
    for length in lengths:
        spaces = [space for space in free if space >= length]
        if not spaces:
            free.append(20)
            spaces = [20]
        free[free.index(min(spaces))] -= length
        expected.append(min(spaces) - length)
    assert sorted(free) == sorted((20 - sizes).astype(int).tolist())


def examples_corpus(prefix: Path, lengths: list[int], first: int = 0, name: str = "answers") -> tuple[str, np.ndarray]:
    """Write a corpus whose token ids are positions, with the last half of each example as its answer."""
    path = write_numbered_corpus(prefix, [[length] for length in lengths], first)
    mask = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    write_mask(path, name, [mask], {})
    return path, mask


def build(prefixes: list[str], samples: int, **data: Any) -> Any:
    return build_datasets(
        DataConfig(data_path=prefixes, split="1,0,0", slm_loss_mask="answers", **data),
        tokenizer=NullTokenizer(TokenizerFiles(vocab_size=VOCABULARY)),
        seq_length=LENGTH,
        train_samples=samples,
        valid_samples=0,
        seed=3,
    ).train


def examples_of(sample: dict[str, Any]) -> list[list[int]]:
    """Return the examples of a sample, which position ids divide."""
    tokens, starts = sample["tokens"].tolist(), np.flatnonzero(sample["position_ids"].numpy() == 0).tolist()
    return [tokens[start:stop] for start, stop in zip(starts, [*starts[1:], LENGTH], strict=True)]


def test_samples_hold_whole_examples(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(2, LENGTH + 1, 50).tolist()
    prefix, mask = examples_corpus(tmp_path / "c", lengths)
    corpus = build([prefix], 200)
    starts = np.cumsum([0, *lengths[:-1]])
    expected = {int(start): list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)}
    seen: list[int] = []
    for index in range(len(corpus)):
        sample, column = corpus[index], 0
        labels, trained = sample["labels"].numpy(), sample["loss_mask"].numpy() > 0
        for example in examples_of(sample):
            if example[0] == EOD:  # padding
                assert set(example) == {EOD} and not trained[column:].any()
                continue
            seen.append(example[0])
            assert example == expected[example[0]]
            here = slice(column, column + len(example) - 1)
            assert (labels[here] == example[1:]).all()
            assert (trained[here] == mask[example[1:]]).all()
            assert not trained[here.stop], "the last token has no label in its example"
            column += len(example)
        numbers = np.cumsum(sample["position_ids"].numpy() == 0)
        allowed = (numbers[:, None] == numbers[None]) & (np.arange(LENGTH)[:, None] >= np.arange(LENGTH))
        assert (document_mask(sample["documents"][None])[0, 0].numpy() == ~allowed).all()
        places = np.concatenate([np.arange(start, stop) for start, stop in label_ranges(corpus, index)])
        assert (places[trained[: len(places)]] == labels[trained]).all(), "scores belong to the labels"
    epoch = round(corpus.samples_per_epoch())
    assert sorted(seen[:50]) == sorted(expected), "an epoch reads every example once"
    assert seen[:50] != seen[50:100] and len(corpus) >= 200 > epoch


def test_order_depends_on_the_seed_only(tmp_path: Path) -> None:
    lengths = np.random.default_rng(2).integers(2, LENGTH + 1, 40).tolist()
    prefix, _ = examples_corpus(tmp_path / "c", lengths)
    short, long = build([prefix], 10), build([prefix], 300)
    for index in range(10):
        assert short[index]["tokens"].tolist() == long[index]["tokens"].tolist()


def test_blends_of_examples(tmp_path: Path) -> None:
    one, _ = examples_corpus(tmp_path / "one", [5] * 30)
    two, _ = examples_corpus(tmp_path / "two", [7] * 30, first=500)
    blend = build(["0.25", one, "0.75", two], 40)
    sizes = [len(examples_of(blend[index])[0]) for index in range(40)]
    assert (sizes.count(5), sizes.count(7)) == (10, 30)


def test_examples_without_a_trained_label_are_omitted(tmp_path: Path) -> None:
    prefix, _ = examples_corpus(tmp_path / "c", [4, 4, 4])
    write_mask(prefix, "answers", [np.array([1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0], bool)], {})
    firsts = {examples_of(build([prefix], 3)[index])[0][0] for index in range(3)}
    assert firsts == {4}, "the first token of an example is never a label"
    write_mask(prefix, "answers", [np.zeros(12, bool)], {})
    with pytest.raises(ConfigError, match="no example of the train split"):
        build([prefix], 3)


def test_validation_corpora_without_the_mask_use_all_answers(tmp_path: Path) -> None:
    """A mask of tools/select_tokens.py exists for training corpora only."""
    one, _ = examples_corpus(tmp_path / "one", [5] * 30)
    two, mask = examples_corpus(tmp_path / "two", [7] * 30, first=500)
    write_mask(one, "best", [np.ones(150, bool)], {})
    data = DataConfig(data_path=[one], valid_data_path={"v": [two]}, slm_loss_mask="best", full_validation=True)
    check_loss_masks(data, LENGTH)
    tokenizer = NullTokenizer(TokenizerFiles(vocab_size=VOCABULARY))
    built = build_datasets(data, tokenizer=tokenizer, seq_length=LENGTH, train_samples=4, valid_samples=4, seed=1)
    trained = sum(float(built.valid["v"][index]["loss_mask"].sum()) for index in range(len(built.valid["v"])))
    assert trained == mask.sum()
    mask_path(two, "answers").unlink()
    check_loss_masks(data, 5)


def test_corpora_that_do_not_fit(tmp_path: Path) -> None:
    prefix, _ = examples_corpus(tmp_path / "c", [4, LENGTH + 1])
    data = DataConfig(data_path=[prefix], slm_loss_mask="answers")
    check_loss_masks(data, LENGTH + 1)
    with pytest.raises(ConfigError, match=rf"1 of 2 examples are longer than --seq-length {LENGTH}; .*--long-examples"):
        check_loss_masks(data, LENGTH)
    plain = write_numbered_corpus(tmp_path / "plain", [[8]])
    check_loss_masks(DataConfig(data_path=[prefix], valid_data_path={"v": [plain]}, slm_loss_mask="answers"), 20)
    with pytest.raises(ConfigError, match=r"plain\.answers\.mask is missing"):
        check_loss_masks(DataConfig(data_path=[plain], slm_loss_mask="answers"), 20)
