"""Scored samples: each label gets the score of its corpus position, for any seed, epoch, blend, split and layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.config.schema import DataConfig
from megatron_slm.data.batches import BatchShape, BatchStream
from megatron_slm.data.datasets import build_datasets
from megatron_slm.scores.samples import ScoredSamples
from megatron_slm.testing.numbered import write_numbered_corpus
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.tokenizers.tokenizer import NullTokenizer, TokenizerFiles

SECOND = 100_000  # the first token of the second corpus


class Places:
    """Write scores that identify their token: the loss is the token position, and the entropy its negative."""

    with_entropy = True

    def __init__(self, first: int) -> None:
        self.first = first

    def losses(self, start: int, stop: int) -> Any:
        return np.arange(self.first + start, self.first + stop, dtype=np.float32)

    def entropies(self, start: int, stop: int) -> Any:
        return -np.arange(self.first + start, self.first + stop, dtype=np.float32)


def _labels_and_scores(
    rank: int, world_size: int, directory: str, words: list[str], split: str | None, seq_length: int, seed: int
) -> int:
    first, second = f"{directory}/one", f"{directory}/two"
    data = DataConfig(
        data_path=[word.format(directory) for word in words], split=split, data_cache_path=f"{directory}/cache"
    )
    datasets = build_datasets(
        data,
        tokenizer=NullTokenizer(TokenizerFiles(vocab_size=2 * SECOND)),
        seq_length=seq_length,
        train_samples=96,
        valid_samples=0,
        seed=seed,
    )
    scored = ScoredSamples(datasets.train, {first: Places(0), second: Places(SECOND)})  # type: ignore[dict-item]
    assert len(scored) == len(datasets.train)  # type: ignore[arg-type]
    shape = BatchShape(micro_batch_size=4, num_micro_batches=2, dp_rank=rank, dp_size=world_size)
    stream = BatchStream(scored, shape, device=torch.device("cpu"), read_ahead=1)
    epochs = 0
    for _ in range(96 // shape.global_batch_size):
        for batch in next(stream):
            assert batch.reference_loss is not None and batch.reference_entropy is not None
            assert torch.equal(batch.reference_loss.long(), batch.labels)
            assert torch.equal(batch.reference_entropy, -batch.reference_loss)
            for row, number in enumerate(batch.sample_index.tolist()):
                assert torch.equal(datasets.train[number]["labels"], batch.labels[row])
            epochs += batch.labels.numel()
    stream.close()
    return epochs


@pytest.mark.parametrize("seq_length", [8, 37])
@pytest.mark.parametrize(
    ("words", "split"),
    [
        (["{}/one"], None),
        (["{}/one"], "70,20,10"),
        (["1", "{}/one"], None),
        (["0.3", "{}/one", "0.7", "{}/two"], None),
        (["3", "{}/two", "1", "{}/one"], "60,40,0"),
    ],
    ids=str,
)
def test_every_label_gets_the_score_of_its_position(
    tmp_path: Path, words: list[str], split: str | None, seq_length: int
) -> None:
    rng = random.Random(seq_length)
    for name, first in (("one", 0), ("two", SECOND)):
        documents = [[rng.randint(1, 40) for _ in range(rng.randint(1, 3))] for _ in range(25)]
        write_numbered_corpus(tmp_path / name, documents, first)
    counts = run_ranks(_labels_and_scores, 2, str(tmp_path), words, split, seq_length, 7 + seq_length)
    assert counts == [48 * seq_length] * 2
