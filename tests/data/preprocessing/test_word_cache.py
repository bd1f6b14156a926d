"""The word cache gives the tokenizer's own ids, for random vocabularies and any text, or steps aside."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizer_models import (
    HARD,
    byte_level_model,
    changed,
    metaspace_model,
    random_lines,
    sentencepiece_model,
    texts,
)
from tokenizers import Tokenizer

from megatron_slm.data.preprocessing import word_cache
from megatron_slm.data.preprocessing.word_cache import fast_encoder, plain_encoder, why_plain
from megatron_slm.data.tokenizers.pretoken_cuts import GPT2, WHITE, WORDS_OF, huggingface_cuts
from megatron_slm.data.tokenizers.sentencepiece_cuts import sentencepiece_cuts
from megatron_slm.data.tokenizers.word_cuts import WordCuts, kept_apart
from megatron_slm.runtime.errors import ConfigError

EXAMPLES = settings(max_examples=80, deadline=None)
SEEDS = (1, 2, 3)
Ids = Callable[[str], Sequence[int]]


class Subject:
    """A tokenizer of any library, as fast_encoder sees it."""

    name, source, fingerprint, eod = "Subject", "--tokenizer-model subject", "", 0

    def __init__(self, encode: Ids, cuts: Callable[[], WordCuts]) -> None:
        self.encode, self.word_cuts = encode, cuts

    def decode(self, ids: Sequence[int]) -> str:
        return f"{len(ids)} tokens"


def of_sentencepiece(model: Any) -> Subject:
    return Subject(model.encode_as_ids, lambda: sentencepiece_cuts(model))


def of_huggingface(model: Any) -> Subject:
    return Subject(lambda text: model.encode(text).ids, lambda: huggingface_cuts(model))


def expect_equal(subject: Any) -> None:
    """The cached way is the plain way on every text, met once and met again, and is not the plain way itself."""
    assert why_plain(subject) is None
    fast, plain = fast_encoder(subject, np.int32, check_every=0), plain_encoder(subject, np.int32)

    @EXAMPLES
    @given(texts())
    def run(text: str) -> None:
        wanted = plain(text)
        assert fast(text) == wanted
        assert fast(text) == wanted

    run()
    for text in (*HARD, *random_lines(99, 20), "\n".join(random_lines(5, 20)), "x".join(HARD)):
        assert fast(text) == plain(text), repr(text)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split_digits": True, "add_dummy_prefix": False},
        {"byte_fallback": False},
        {"byte_fallback": False, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": True},
        {"user_defined_symbols": "<tag>,▁▁▁,\n\n,//", "split_by_unicode_script": False, "split_by_number": False},
        {"allow_whitespace_only_pieces": False, "user_defined_symbols": "é,.b"},
        {"byte_fallback": False, "normalization_rule_name": "nfkc", "user_defined_symbols": "\n,<tag>"},
    ],
    ids=str,
)
def test_sentencepiece_bpe(seed: int, options: dict[str, Any]) -> None:
    expect_equal(of_sentencepiece(sentencepiece_model(seed, **options)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"prefix": True}, {"normalizer": "NFC"}, {"normalizer": "NFD", "prefix": True}, {"specials": True}],
    ids=str,
)
def test_byte_level(seed: int, options: dict[str, Any]) -> None:
    expect_equal(of_huggingface(byte_level_model(seed, **options)))


@pytest.mark.parametrize("pattern", list(WORDS_OF)[1:])
def test_split_by_expression_then_byte_level(pattern: str) -> None:
    expect_equal(of_huggingface(byte_level_model(4, pattern)))
    expect_equal(of_huggingface(byte_level_model(5, pattern, specials=True, normalizer="NFC")))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("prepend_scheme", ["always", "first", "never", None])
def test_metaspace_and_llama_2(seed: int, prepend_scheme: str | None) -> None:
    expect_equal(of_huggingface(metaspace_model(seed, prepend_scheme)))


def test_white_space_is_what_the_pre_tokenizers_expression_takes_for_it() -> None:
    """Every character between two letters: GPT-2's expression joins it with neither or not, as WHITE says."""
    import re

    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    text = "".join(f"a{character}" for character in characters)
    found = {part for part, _ in split.pre_tokenize_str(text) if len(part) == 1 and part != "a"}
    assert found == set(re.findall(f"[{WHITE}]", "".join(characters)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: of_sentencepiece(sentencepiece_model(1, model_type="unigram")), "only BPE"),
        (lambda: of_sentencepiece(sentencepiece_model(1, split_by_whitespace=False)), "crosses a border"),
        (lambda: of_sentencepiece(sentencepiece_model(1, user_defined_symbols="a b")), "'a b'"),
        (lambda: of_sentencepiece(sentencepiece_model(1, treat_whitespace_as_suffix=True)), "way of its own"),
        (lambda: of_sentencepiece(changed(sentencepiece_model(1), unused_piece)), "is unused"),
        (lambda: of_sentencepiece(changed(sentencepiece_model(1), control_character)), "control symbol"),
        (lambda: of_sentencepiece(changed(sentencepiece_model(1, byte_fallback=False), no_space)), "has no '▁'"),
        (lambda: of_huggingface(byte_level_model(1, normalizer="NFKC")), "normalizer NFKC"),
        (lambda: of_huggingface(byte_level_model(1, r"\w+|\W+")), "expression"),
        (lambda: of_huggingface(with_changes(replaces_runs)), "normalizer Replace"),
        (lambda: of_huggingface(with_changes(merges_bytes)), "merges of bytes"),
        (lambda: of_huggingface(with_changes(lacks_a_byte)), "no byte fallback"),
        (lambda: of_huggingface(with_changes(adds_spaces)), "added token with a space"),
    ],
)
def test_tokenizers_without_an_exact_cut_go_the_plain_way(model: Callable[[], Subject], reason: str) -> None:
    subject = model()
    assert reason in str(why_plain(subject))
    encode = fast_encoder(subject, np.uint16)
    for text in ("", "ab  cd\n\n12", *random_lines(3, 5)):
        assert encode(text) == np.array(subject.encode(text), np.uint16).tobytes()


def unused_piece(proto: Any) -> None:
    next(piece for piece in proto.pieces if len(piece.piece) > 2 and piece.type == piece.NORMAL).type = 5


def control_character(proto: Any) -> None:
    next(piece for piece in proto.pieces if piece.piece == "a").type = 3


def with_changes(change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    """A model like Llama 2's with its settings changed."""
    content = json.loads(metaspace_model(1, None).to_str())
    change(content)
    return Tokenizer.from_str(json.dumps(content))


def replaces_runs(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def merges_bytes(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<0x0A><0x0A>"] = 5000
    content["model"]["merges"].append(["<0x0A>", "<0x0A>"])


def lacks_a_byte(content: dict[str, Any]) -> None:
    content["model"]["byte_fallback"] = False


def adds_spaces(content: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    content["added_tokens"].append({"id": 6000, "content": "▁▁▁▁", "normalized": True, **flags})


def no_space(proto: Any) -> None:
    next(piece for piece in proto.pieces if piece.piece == "▁").piece = "≋"


def test_kept_apart_is_the_largest_closed_set() -> None:
    assert kept_apart(".,;-", ["a", "..", ".,", "-a", "b"]) == frozenset(".,;")
    assert kept_apart(".,;", [",.", "a,"]) == frozenset(";"), "'.' stands beside ',', which stands beside a letter"
    assert kept_apart(".,;", []) == frozenset(".,;")


def test_a_difference_ends_the_job_and_says_where() -> None:
    model = sentencepiece_model(1)
    cuts = sentencepiece_cuts(model)
    wrong = WordCuts(lambda text: list(text), cuts.encode, None, cuts.prepare)  # cuts inside words
    word = next(piece for piece in random_lines(1, 1)[0].split() if len(model.encode(piece)) < len(piece))
    encode = fast_encoder(Subject(model.encode_as_ids, lambda: wrong), np.uint16, check_every=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--tokenizer-model subject.*first difference is at token \d+") as caught:
        encode(f"{word} {word}")
    assert word in str(caught.value) and "--no-word-cache" in str(caught.value)

    encode = fast_encoder(Subject(model.encode_as_ids, lambda: wrong), np.uint16, check_every=3)  # type: ignore[arg-type]
    for _ in range(3):
        encode("")  # the first is checked, and equal; the next two are not
    with pytest.raises(ConfigError):
        encode(word)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MOST_WORDS", 50)
    monkeypatch.setattr(word_cache, "MOST_PIECES", 20)
    model = sentencepiece_model(1)
    encode: Any = fast_encoder(of_sentencepiece(model), np.int32, check_every=0)
    for line in random_lines(8, 200):
        assert encode(line) == np.array(model.encode(line), np.int32).tobytes()
        assert len(encode.words) <= 50
    long = "a" * (word_cache.LONGEST_WORD + 1)
    encode(long)
    assert long not in encode.words and f" {long}" not in encode.words
    assert all(len(word) <= word_cache.LONGEST_WORD for word in encode.words)


def test_ids_beyond_the_dtype_are_an_error() -> None:
    subject = Subject(lambda text: [1 << 16], lambda: WordCuts(str.split, lambda word: [1 << 16]))
    for encode in (fast_encoder(subject, np.uint16), plain_encoder(subject, np.uint16)):  # type: ignore[arg-type]
        with pytest.raises(OverflowError):
            encode("word")


def test_half_a_surrogate_pair_is_an_error_of_the_text() -> None:
    for subject in (of_sentencepiece(sentencepiece_model(1)), of_huggingface(byte_level_model(1))):
        for encode in (fast_encoder(subject, np.int32), plain_encoder(subject, np.int32)):  # type: ignore[arg-type]
            with pytest.raises(UnicodeEncodeError):
                encode("a \ud800 b")


def test_gpt2_pattern_is_the_one_that_byte_level_uses() -> None:
    from tokenizers import Regex, pre_tokenizers

    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT2), "isolated"), pre_tokenizers.ByteLevel(False, False)]
    )
    for text in ("".join(HARD), "\n".join(random_lines(1, 30))):
        assert own.pre_tokenize_str(text) == ours.pre_tokenize_str(text)
