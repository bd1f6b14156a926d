"""Token sequences of requests, compared with the rules of lm-evaluation-harness's Hugging Face backend."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_slm.evaluation.encoding import RequestEncoder
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import Tokenizer, TokenizerFiles, build_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOKENIZERS = {
    "bytes": ("ByteTokenizer", TokenizerFiles()),
    "sentencepiece": ("SentencePieceTokenizer", TokenizerFiles(str(FIXTURES / "sentencepiece.model"))),
    "adds bos and eos": ("HuggingFaceTokenizer", TokenizerFiles(str(FIXTURES / "huggingface"))),
}


def build(name: str) -> Tokenizer:
    return build_tokenizer(*TOKENIZERS[name])


def expected_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a pair as lm_eval.api.model.TemplateLM does."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation, context = context[-spaces:] + continuation, context[:-spaces]
    before = tokenizer.encode(context)
    return before, tokenizer.encode(context + continuation)[len(before) :]


PAIRS = [("a word", " more words"), ("a word ", "joined"), ("a word \n ", " x"), ("wor", "ds and words"), ("é", "🙂")]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("context", "continuation"), PAIRS)
def test_context_and_continuation_are_encoded_as_one_text(name: str, context: str, continuation: str) -> None:
    tokenizer = build(name)
    before, scored = expected_pair(tokenizer, context, continuation)
    request = RequestEncoder(tokenizer, 1000).continuation(context, continuation)
    assert (list(request.tokens), request.first) == (before + scored, len(before)) and scored


def test_an_empty_context_is_the_prefix_token() -> None:
    tokenizer = build("sentencepiece")
    encoder = RequestEncoder(tokenizer, 100)
    request = encoder.continuation("", "some words")
    assert encoder.prefix == tokenizer.bos == 1
    assert list(request.tokens) == [1, *tokenizer.encode("some words")] and request.first == 1
    plain = RequestEncoder(build("bytes"), 100)
    assert plain.prefix == plain.tokenizer.eod and plain.continuation("", "ab").tokens[0] == plain.prefix
    added = build("adds bos and eos")
    assert list(RequestEncoder(added, 100).continuation("", "words").tokens)[1:] == added.encode_plain("words")


@pytest.mark.parametrize("length", [5, 12, 13, 14])
def test_long_requests_lose_their_first_tokens(length: int) -> None:
    request = RequestEncoder(build("bytes"), length).continuation("0123456789", "abcd")
    whole = list(b"0123456789abcd")
    assert list(request.tokens) == whole[-(length + 1) :]
    assert list(request.tokens)[request.first :] == list(b"abcd")


def test_continuations_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="'abcdefg' has 7 tokens, more than the model's context length, 6"):
        RequestEncoder(build("bytes"), 6).continuation("0", "abcdefg")
    with pytest.raises(ConfigError, match="has no tokens"):
        RequestEncoder(build("bytes"), 6).continuation("0", "")


def rolling_windows(tokens: list[int], prefix: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the (input, predicted) pairs of lm_eval.utils.get_rolling_token_windows with one token of context."""
    first = min(size, len(tokens))
    yield [prefix, *tokens[: first - 1]], tokens[:first]
    done = first
    while done < len(tokens):
        count = min(len(tokens) - done, size)
        end = done + count
        yield tokens[end - size - 1 : end - 1], tokens[end - count : end]
        done += count


def test_windows_are_those_of_the_harness() -> None:
    tokenizer, rng = build("bytes"), random.Random(1)
    for length in (1, 6, 7, 8, 14, 15, 40):
        text = "".join(rng.choices("abcdef", k=length))
        encoder = RequestEncoder(tokenizer, 7)
        pairs = list(rolling_windows(tokenizer.encode(text), encoder.prefix, 7))
        windows = [(list(window.tokens), window.first) for window in encoder.windows(text)]
        assert windows == [([*given, predicted[-1]], len(given) + 1 - len(predicted)) for given, predicted in pairs]
    assert RequestEncoder(tokenizer, 7).windows("") == []


def test_prompts_leave_room_for_new_tokens() -> None:
    encoder = RequestEncoder(build("bytes"), 8)
    assert encoder.prompt("0123456789", 3) == list(b"56789")
    assert encoder.prompt("", 3) == [encoder.prefix]
    with pytest.raises(ConfigError, match="8 new tokens do not fit into the model's context of 8"):
        encoder.prompt("a", 8)
