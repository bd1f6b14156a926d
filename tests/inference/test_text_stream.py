"""Test streams of text: pieces hold complete characters, and together they are the decoded text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_slm.inference.text_stream import TextStream
from megatron_slm.tokenizers.tokenizer import Tokenizer, TokenizerFiles, build_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": build_tokenizer("ByteTokenizer", TokenizerFiles()),
    "sentencepiece": build_tokenizer(
        "SentencePieceTokenizer", TokenizerFiles(model=str(FIXTURES / "sentencepiece.model"))
    ),
    "gpt2": build_tokenizer(
        "GPT2BPETokenizer",
        TokenizerFiles(vocab=str(FIXTURES / "gpt2" / "vocab.json"), merges=str(FIXTURES / "gpt2" / "merges.txt")),
    ),
}


def pieces(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*map(stream.push, new), stream.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=40))
def test_pieces_are_complete_and_join_to_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer.encode("The sum is")
    new = tokenizer.encode(f"x {text} ü 漢 🙂 end")
    found = pieces(tokenizer, prompt, new)
    assert not any("\ufffd" in piece for piece in found)
    assert "".join(found) == tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]


def test_the_space_before_the_first_word_is_kept() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    prompt, both = tokenizer.encode("the"), tokenizer.encode("the word")
    assert "".join(pieces(tokenizer, prompt, both[len(prompt) :])) == " word"


def test_incomplete_characters_are_replaced_at_the_end() -> None:
    assert pieces(TOKENIZERS["bytes"], [65], [66, 0xE6, 0xBC]) == ["B", "", "", "\ufffd"]


def test_invalid_bytes_do_not_stop_the_stream() -> None:
    assert "".join(pieces(TOKENIZERS["bytes"], [65], [0xFF, 66, 67])) == "\ufffdBC"
