"""Test that the bytes of a text are the sum of the bytes of its tokens, for every tokenizer type and many models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from test_tokenizers import FILES, TEXTS, build
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models

from megatron_slm.testing.tokenizer_models import (
    LLAMA_3,
    byte_level_model,
    metaspace_model,
    sentencepiece_model,
    texts,
)
from megatron_slm.tokenizers.byte_lengths import ByteLengths, huggingface_byte_lengths, sentencepiece_byte_lengths


def counted(lengths: ByteLengths | None, ids: Sequence[int]) -> int:
    """Return the bytes of the tokens of one text."""
    assert lengths is not None
    return sum(lengths.lengths[token] for token in ids) - sum(lengths.added_spaces[token] for token in ids[:1])


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "NullTokenizer"])
def test_bytes_of_a_text_are_the_sum_over_its_tokens(kind: str) -> None:
    tokenizer = build(kind)
    lengths = tokenizer.byte_lengths()
    assert lengths is not None and len(lengths.lengths) == tokenizer.vocab_size
    assert not any(lengths.lengths[token] for token in tokenizer.special_ids)

    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def run(text: str) -> None:
        assert counted(lengths, tokenizer.encode_plain(text)) == len(text.encode())

    run()


def test_numbers_have_no_bytes() -> None:
    assert build("NullTokenizer").byte_lengths() is None


MODELS: dict[str, Any] = {
    "gpt-2": lambda: byte_level_model(1),
    "gpt-2 with prefix": lambda: byte_level_model(2, prefix=True),
    "llama 3": lambda: byte_level_model(3, LLAMA_3),
    "llama 2": lambda: _with_decoder(metaspace_model(4, None)),
    "metaspace": lambda: _with_decoder(metaspace_model(5, "first")),
}


PREFIX = ("gpt-2 with prefix", "metaspace")  # a space is added unless the text starts with one, which is then the same


def _with_decoder(model: Model) -> Model:
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_difficult_texts(name: str) -> None:
    model = MODELS[name]()
    model.encode_special_tokens = True
    lengths = huggingface_byte_lengths(model, model.get_vocab_size())

    @settings(max_examples=100, deadline=None)
    @given(texts().filter(lambda text: "▁" not in text and not (text.startswith(" ") and name in PREFIX)))
    def run(text: str) -> None:
        ids = model.encode(text, add_special_tokens=False).ids
        assert counted(lengths, ids) == len(text.encode())

    run()


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"model_type": "unigram"}])
def test_bytes_of_sentencepiece_models(options: dict[str, Any]) -> None:
    model = sentencepiece_model(7, **options)
    lengths = sentencepiece_byte_lengths(model)

    @settings(max_examples=100, deadline=None)
    @given(texts().filter(lambda text: "▁" not in text))
    def run(text: str) -> None:
        assert counted(lengths, model.encode(text)) == len(text.encode())

    run()


def test_other_models_are_unknown() -> None:
    words = Model(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    assert huggingface_byte_lengths(words, 3) is None
