"""Test the end of continuations, token by token, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_slm.inference.generation import Generation, _Row
from megatron_slm.inference.sampling import Decoding
from megatron_slm.tokenizers.tokenizer import ByteTokenizer, TokenizerFiles


class Tokenizer(ByteTokenizer):
    """Bytes, with two tokens that end texts."""

    end_ids = frozenset((256, 10))

    def decode(self, ids: Any) -> str:
        return super().decode(ids).removeprefix(" ")  # as of SentencePiece


@pytest.mark.parametrize(
    ("settings", "new", "expected", "pieces"),
    [
        ({}, b"ab\ncd", "ab", ["a", "b", ""]),
        ({"ignore_eos": True}, b"ab\ncd", "ab\nc", ["a", "b", "\n", "c"]),
        ({}, " \u00fcx".encode(), " \u00fcx", [" ", "", "\u00fc", "x"]),
        ({}, "abc\u00fc".encode(), "abc\ufffd", ["a", "b", "c", "\ufffd"]),
        ({"until": ("bc",)}, b"abcd", "a", ["a"]),
        ({"until": ("x", "d", "cd")}, b"abcd", "ab", ["ab"]),
        ({"until": ("x",)}, b"ab\nx", "ab", ["ab"]),
        ({"max_new_tokens": 1}, b"ab", "a", ["a"]),
    ],
    ids=str,
)
def test_rows_end(settings: dict[str, Any], new: bytes, expected: str, pieces: list[str]) -> None:
    shown: list[str] = []
    model: Any = SimpleNamespace(tokenizer=Tokenizer(TokenizerFiles()), context_length=5)
    row = _Row(model, list(b"P"), Decoding(**settings), 0, lambda _, text: shown.append(text))
    for token in new:
        row.push(token)
    assert row.is_done and row.result().text == expected and shown == pieces


def test_texts_without_their_prompts_are_decoded_alone() -> None:
    model: Any = SimpleNamespace(tokenizer=Tokenizer(TokenizerFiles()), context_length=9)
    for joins_prompt, expected in (True, " a b"), (False, "a b"):
        row = _Row(model, list(b"P"), Decoding(), 0, None, joins_prompt=joins_prompt)
        for token in b" a b\n":
            row.push(token)
        assert row.result() == Generation(list(b" a b"), expected)
