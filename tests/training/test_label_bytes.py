"""Test held-out losses in bits per byte: exact bytes of the evaluated labels, equal for every layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_slm.data.batches import MicroBatch
from megatron_slm.testing.tiny import command, launch, launch_each, make_corpus, records
from megatron_slm.tokenizers.base import TokenizerFiles
from megatron_slm.tokenizers.tokenizer import build_tokenizer
from megatron_slm.training.label_bytes import LabelBytes

MODEL = Path(__file__).parent.parent / "fixtures" / "sentencepiece.model"


def test_bytes_of_valid_labels_without_added_spaces() -> None:
    """The tokens are two documents; the space that SentencePiece adds at their start is not in the text."""
    tokenizer = build_tokenizer("SentencePieceTokenizer", TokenizerFiles(str(MODEL)))
    texts = ["héllo wörld", "one two"]
    stream = [tokenizer.eod, *(token for text in texts for token in (*tokenizer.encode(text), tokenizer.eod))]
    tokens, labels = torch.tensor([stream[:-1]]), torch.tensor([stream[1:]])
    valid = torch.ones_like(labels, dtype=torch.bool)
    batch = MicroBatch(tokens, labels, valid, torch.arange(labels.size(1))[None], torch.zeros(1), 0)
    counter = LabelBytes(tokenizer, torch.device("cpu"))
    assert int(counter.count(batch)) == sum(len(text.encode()) for text in texts)
    valid[0, 0] = False
    first = len(tokenizer.decode([stream[1]]).strip().encode())
    assert int(counter.count(batch)) == sum(len(text.encode()) for text in texts) - first


def test_evaluations_have_bits_per_byte(tmp_path: Path) -> None:
    """The byte tokenizer has one byte per token, and none for the end of a document."""
    corpus = make_corpus(tmp_path / "corpus", 1)
    flags = {"train_iters": 1, "eval_iters": 2}
    ids = make_ids(corpus, tmp_path)
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "257"]
    launch_each([command(corpus, tmp_path / "one", **flags), [*command(ids, tmp_path / "null", **flags), *null]])
    launch(command(corpus, tmp_path / "cp", context_parallel_size=2, **flags), world_size=2)
    one, many = records(tmp_path / "one", "eval"), records(tmp_path / "cp", "eval")
    for record in one:
        assert record["tokens_evaluated"] * 0.97 < record["bytes_evaluated"] < record["tokens_evaluated"]
        nats = record["loss"] * record["tokens_evaluated"]
        assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / record["bytes_evaluated"])
    assert [record["bytes_evaluated"] for record in many] == [record["bytes_evaluated"] for record in one]
    assert all(record["bits_per_byte"] is None for record in records(tmp_path / "null", "eval"))


def make_ids(corpus: str, directory: Path) -> str:
    """Return a copy of a corpus without metadata, which any tokenizer may read."""
    for suffix in (".bin", ".idx"):
        (directory / f"ids{suffix}").write_bytes(Path(f"{corpus}{suffix}").read_bytes())
    return str(directory / "ids")
