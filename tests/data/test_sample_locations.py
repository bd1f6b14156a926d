"""Test that the documents of a sample hold its tokens, for blends, splits, joined sentences and wrapped datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.config.schema import DataConfig
from megatron_slm.corpus.index import read_index
from megatron_slm.corpus.inspection import document_ids
from megatron_slm.data.datasets import build_datasets, training_samples
from megatron_slm.data.document_samples import samples_of_document
from megatron_slm.data.sample_locations import DocumentSpan, document_spans
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.scores.samples import ScoredSamples
from megatron_slm.testing.chat import make_examples
from megatron_slm.tokenizers.base import TokenizerFiles
from megatron_slm.tokenizers.plain_tokenizers import ByteTokenizer

SEQUENCE = 64


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two corpora with documents of 1 to 80 tokens, of which every third one is empty, and one of sentences."""
    directory, prefixes = tmp_path_factory.mktemp("corpora"), []
    for name, sentences in (("a", False), ("b", False), ("s", True)):
        texts = ["" if number % 3 == 2 else f"{name}{number}. " * (number % 14 + 1) for number in range(90)]
        path = directory / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
        job = Job([str(path)], ["text"], str(directory / name), "ByteTokenizer", TokenizerFiles(), append_eod=True)
        if sentences:
            job = Job(
                *([str(path)], ["text"], str(directory / name), "ByteTokenizer", TokenizerFiles()),
                append_eod=True,
                split_sentences=True,
            )
        preprocess(job)
        prefixes.append(job.prefix("text"))
    return prefixes


def check(dataset: Any, samples: int) -> set[str]:
    """Compare the tokens of all samples with those of their documents; return the corpora."""
    found = set()
    for index in range(samples):
        spans = document_spans(dataset, index)
        parts = [
            document_ids(read_index(span.corpus), span.document)[span.offset : span.offset + span.tokens]
            for span in spans
        ]
        assert [len(part) for part in parts] == [span.tokens for span in spans]
        sample = dataset[index]
        assert np.concatenate(parts).tolist() == [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        found |= {span.corpus for span in spans}
    return found


def build(data: DataConfig) -> Any:
    return training_samples(data, tokenizer=ByteTokenizer(TokenizerFiles()), seq_length=SEQUENCE, samples=40, seed=7)


@pytest.mark.parametrize("order", ["megatron", "stable"])
def test_documents_of_a_blend_hold_the_tokens_of_each_sample(corpora: list[str], order: str) -> None:
    dataset = build(DataConfig(data_path=["0.7", corpora[0], "0.3", corpora[1]], split="90,10,0", data_order=order))
    assert check(dataset, 40) == set(corpora[:2])
    scored = ScoredSamples(dataset, scores=None)  # type: ignore[arg-type]
    assert document_spans(scored, 3) == document_spans(dataset, 3) != []


@pytest.mark.parametrize("sentences", ["join", "separate"])
def test_sentences_are_located_in_their_documents(corpora: list[str], sentences: str) -> None:
    dataset = build(DataConfig(data_path=[corpora[2]], split="100,0,0", slm_sentences=sentences))
    check(dataset, 40)
    if sentences == "join":
        documents = [span.document for index in range(40) for span in document_spans(dataset, index)]
        assert len(set(documents)) > 40


def test_packed_examples_are_located_without_padding(tmp_path: Path) -> None:
    pairs = [{"prompt": "ab" * (number % 5 + 1), "completion": f"c{number}"} for number in range(60)]
    dataset = build(
        DataConfig(data_path=[make_examples(tmp_path / "pairs", pairs)], split="100,0,0", slm_loss_mask="answers")
    )
    for index in range(20):
        spans = document_spans(dataset, index)
        assert len(spans) > 1 and all(span.offset == 0 for span in spans)
        tokens = np.concatenate([document_ids(read_index(span.corpus), span.document) for span in spans])
        assert len(tokens) == sum(span.tokens for span in spans)
        assert tokens.tolist() == dataset[index]["tokens"][: len(tokens)].tolist()
    check_documents(dataset, 20)


def test_mock_data_has_no_documents() -> None:
    data, tokenizer = DataConfig(mock_data=True), ByteTokenizer(TokenizerFiles())
    sets = build_datasets(data, tokenizer=tokenizer, seq_length=SEQUENCE, train_samples=8, valid_samples=0, seed=7)
    assert document_spans(sets.train, 0) == []


def check_documents(dataset: Any, count: int) -> None:
    """Compare the samples of documents with those found by reading all samples of a dataset."""
    expected: dict[tuple[str, int], list[tuple[int, DocumentSpan]]] = {}
    for sample in range(count):
        for span in document_spans(dataset, sample):
            expected.setdefault((span.corpus, span.document), []).append((sample, span))
    prefixes = {prefix for prefix, _ in expected}
    assert len(prefixes) == len(getattr(dataset, "datasets", [dataset]))
    for prefix in prefixes:
        last = read_index(prefix).documents - 1
        for document in {*range(0, last, 7), last}:
            found = [each for each in samples_of_document(dataset, prefix, document) if each[0] < count]
            assert found == expected.get((prefix, document), []), (prefix, document)
            assert {type(sample) for sample, _ in found} <= {int}, "JSON accepts no integers of numpy"


@pytest.mark.parametrize("order", ["megatron", "stable"])
def test_samples_of_documents_over_several_epochs_of_a_blend(corpora: list[str], order: str) -> None:
    """40 samples are more than one epoch of the second corpus."""
    dataset = build(DataConfig(data_path=["0.3", corpora[0], "0.7", corpora[1]], split="90,10,0", data_order=order))
    check_documents(dataset, 40)


@pytest.mark.parametrize("sentences", ["join", "separate"])
def test_samples_of_documents_of_sentences(corpora: list[str], sentences: str) -> None:
    check_documents(build(DataConfig(data_path=[corpora[2]], split="100,0,0", slm_sentences=sentences)), 40)
