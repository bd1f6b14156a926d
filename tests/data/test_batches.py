"""Batches: sample order for any batch shape, resuming, prefetching, and the dataset options."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.schema import DataConfig
from megatron_slm.data.batches import BatchShape, BatchStream, MicroBatch, document_mask
from megatron_slm.data.datasets import build_datasets, parse_blend
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import make_corpus
from megatron_slm.tokenizers.tokenizer import ByteTokenizer, TokenizerFiles

CPU = torch.device("cpu")


class Numbers(torch.utils.data.Dataset):
    """Dataset whose sample i consists of the number i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.full((4,), index)
        return {"tokens": row, "labels": row, "loss_mask": torch.ones(4), "position_ids": torch.arange(4)}


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_context_parallel_slices_match_megatron_core(size: int, chunk: int, masked: bool) -> None:
    """Every token is on exactly one rank, in the order of Megatron-Core's get_batch_on_this_cp_rank."""
    length = 2 * size * chunk
    columns = torch.arange(2 * length).view(2, length)
    documents = torch.randint(0, 3, (2, length), dtype=torch.int32).cumsum(1) if masked else None
    batch = MicroBatch(columns, columns, columns > 3, columns, torch.tensor([7, 8]), 7, documents)
    mask = None if documents is None else document_mask(documents)
    assert (batch.attention_mask is not None) == masked
    indices = []
    for rank in range(size):
        piece = batch.cp_slice(size, rank)
        chunks = columns.view(2, 2 * size, chunk)
        expected = torch.cat((chunks[:, rank], chunks[:, 2 * size - 1 - rank]), 1)
        for got in (piece.tokens, piece.labels, piece.position_ids, piece.token_index() - 7 * length):
            assert torch.equal(got, expected)
        assert piece.sample_length == length and torch.equal(piece.loss_mask, expected > 3)
        if mask is not None and size > 1:
            assert piece.attention_mask is not None and piece.positions is not None
            assert torch.equal(piece.attention_mask, mask[:, :, piece.positions])
        indices.append(piece.token_index().flatten())
    assert torch.equal(torch.cat(indices).sort().values, batch.token_index().flatten())


def read_samples(size: int, micro: int, steps: int, dp: int, start: int, batches: int, ahead: int) -> list[int]:
    """Return the samples of ``batches`` global batches in run order."""
    streams = [
        BatchStream(Numbers(size), BatchShape(micro, steps, rank, dp), device=CPU, start_sample=start, read_ahead=ahead)
        for rank in range(dp)
    ]
    order = []
    for _ in range(batches):
        ranks = [next(stream) for stream in streams]
        for step in range(steps):
            for rank in range(dp):
                batch = ranks[rank][step]
                assert torch.equal(batch.tokens[:, 0], batch.sample_index)
                assert batch.first_sample == ranks[0][step].sample_index[0]
                order += batch.tokens[:, 0].tolist()
    for stream in streams:
        stream.close()
    return order


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 20), st.integers(0, 2))
def test_samples_are_in_order_for_any_batch_shape(micro: int, steps: int, dp: int, start: int, ahead: int) -> None:
    count = 2 * micro * steps * dp
    assert read_samples(start + count, micro, steps, dp, start, 2, ahead) == list(range(start, start + count))


@pytest.mark.parametrize("ahead", [0, 2])
def test_samples_are_in_order_for_increasing_batches(ahead: int) -> None:
    """After 4 samples of a run on two ranks, the ramp 4, 4, 4, 8, 12 continues with its second batch."""
    sizes = BatchSizes(final=16, start=4, increment=4, ramp_samples=30)
    shapes = [BatchShape(2, 4, rank, 2) for rank in range(2)]
    streams = [
        BatchStream(Numbers(32), shape, sizes=sizes, device=CPU, start_sample=4, read_ahead=ahead) for shape in shapes
    ]
    for steps in ([4], [8], [12, 16], [20, 24, 28]):
        ranks = [next(stream) for stream in streams]
        found = [[batch.sample_index.tolist() for batch in pair] for pair in zip(*ranks, strict=True)]
        assert found == [[[first, first + 1], [first + 2, first + 3]] for first in steps]
        assert [batch.first_sample for batch in ranks[1]] == steps
    with pytest.raises(ConfigError, match="the batch at sample 32 exceeds it"):
        next(streams[0])
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_exhausted_dataset_is_an_error(ahead: int) -> None:
    stream = BatchStream(Numbers(5), BatchShape(2, 1, 0, 2), device=CPU, read_ahead=ahead)
    next(stream)
    with pytest.raises(ConfigError, match="the dataset has 5 samples"):
        next(stream)
    stream.close()


def test_evaluation_masks_missing_samples() -> None:
    stream = BatchStream(Numbers(3), BatchShape(2, 2, 0, 1), device=CPU, masks_missing=True)
    assert [bool(row.any()) for batch in next(stream) for row in batch.loss_mask] == [True, True, True, False]


@pytest.mark.parametrize("ahead", [0, 2])
def test_steps_limit_the_samples_that_are_read(ahead: int) -> None:
    numbers = Numbers(5)
    with mock.patch.object(Numbers, "__getitem__", autospec=True, side_effect=Numbers.__getitem__) as read:
        stream = BatchStream(numbers, BatchShape(1, 1, 0, 1), device=CPU, steps=3, read_ahead=ahead, masks_missing=True)
        assert [int(batch.tokens[0, 0]) for (batch,) in stream] == [0, 1, 2] and read.call_count == 3


def test_blends_match_megatron_core() -> None:
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["0.3", "a", "0.7", "b"]) == (["a", "b"], [0.3, 0.7])
    assert parse_blend(["a", "b"]) == (["a", "b"], None)


def _with_options(rank: int, world_size: int, data: DataConfig) -> list[dict[str, torch.Tensor]]:
    sets = build_datasets(
        data, tokenizer=ByteTokenizer(TokenizerFiles()), seq_length=64, train_samples=30, valid_samples=4, seed=5
    )
    assert list(sets.valid) == list(data.valid_data_path)
    return [sets.train[index] for index in range(30)]


def test_document_boundary_options(tmp_path: Path) -> None:
    prefix = make_corpus(tmp_path / "corpus", 1)
    data = DataConfig(
        data_path=["0.5", prefix, "0.5", make_corpus(tmp_path / "other", 2)],
        valid_data_path={"mine": [prefix], "both": ["1", prefix, "3", prefix]},
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )
    [samples] = run_ranks(_with_options, 1, data)
    eod, ends = 256, 0
    for sample in samples:
        assert all(value.numel() == 64 for value in sample.values() if isinstance(value, torch.Tensor)), "no dense mask"
        tokens, mask = sample["tokens"], document_mask(sample["documents"][None])[0, 0]
        start = 0
        for position, token in enumerate(tokens.tolist()):
            assert int(sample["position_ids"][position]) == position - start
            assert bool(mask[position, :start].all()) and not bool(mask[position, start : position + 1].any())
            assert bool(sample["loss_mask"][position]) == (token != eod)
            if token == eod:
                start, ends = position + 1, ends + 1
    assert ends > 0
