"""Encoding engines: gigatoken reproduces the tokenizer's ids for random vocabularies and texts, or is not used."""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from megatron_slm.preprocessing import engines
from megatron_slm.preprocessing.engines import GigatokenEngine, PlainEngine, build_engine
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.tokenizer_models import (
    HARD,
    LLAMA_3,
    byte_level_model,
    changed,
    metaspace_model,
    random_lines,
    sentencepiece_model,
    texts,
)
from megatron_slm.tokenizers.fast_model import FastModel, UnsupportedTokenizer, overlap_probes
from megatron_slm.tokenizers.huggingface_fast import byte_characters, huggingface_fast_model
from megatron_slm.tokenizers.sentencepiece_fast import sentencepiece_fast_model
from megatron_slm.tokenizers.tiktoken_tokenizer import TikTokenizer
from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer

EXAMPLES = settings(max_examples=25, deadline=None)
SEEDS = (1, 2)
INT32 = np.dtype(np.int32)
CL100K = LLAMA_3.replace(r"\s*[\r\n]+|", r"\s*[\r\n]|")
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = TikTokenizer.TIKTOKEN_PATTERN.replace(r"\p{M}]+|", rf"\p{{M}}]+{CONTRACTION}|").replace(
    r"\p{M}]*|", rf"\p{{M}}]*{CONTRACTION}|"
)
SPLITS = (CL100K, LLAMA_3, QWEN_2, O200K, TikTokenizer.PATTERNS["v2"])


class Subject:
    """A tokenizer of any library, as an engine uses it."""

    name, source, fingerprint, eod = "Subject", "--tokenizer-model subject", "", 0
    vocab_size, special_ids, ends_texts, unique_identifiers = 1 << 20, frozenset[int](), False, None

    def __init__(self, encode: Callable[[str], Sequence[int]], fast_model: Callable[[], FastModel]) -> None:
        self.encode, self.fast_model = encode, fast_model

    def decode(self, ids: Sequence[int]) -> str:
        return f"{len(ids)} tokens"


def of_sentencepiece(model: Any) -> Any:
    return Subject(model.encode_as_ids, lambda: sentencepiece_fast_model(model))


def of_huggingface(model: Any) -> Any:
    return Subject(lambda text: model.encode(text).ids, lambda: huggingface_fast_model(model))


def array(items: Sequence[str]) -> pa.LargeStringArray:
    return pa.array(items, pa.large_string())


def expect_equal(subject: Any, *more: str) -> None:
    """gigatoken is used, and its ids are the tokenizer's on every batch of texts."""
    fast, reason = build_engine(subject, INT32)
    assert fast.name == "gigatoken", reason
    plain = PlainEngine(subject, INT32)

    def compare(batch: list[str]) -> None:
        for got, wanted in zip(fast.encode(array(batch)), plain.encode(array(batch)), strict=True):
            assert got.dtype == wanted.dtype and got.tolist() == wanted.tolist()

    @EXAMPLES
    @given(st.lists(texts(), max_size=6))
    def run(batch: list[str]) -> None:
        compare(batch)

    run()
    compare([*HARD, *more, *random_lines(99, 20), "\n".join(random_lines(5, 20)), "x".join(HARD)])
    compare(["a" * 3_000, "word " * 600, " " * 2_000, "日本語" * 500])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split_digits": True, "add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": True, "add_dummy_prefix": False},
        {"user_defined_symbols": "<tag>,▁▁▁,\n\n,//", "split_by_unicode_script": False, "split_by_number": False},
        {"allow_whitespace_only_pieces": False, "user_defined_symbols": "é,.b,a b", "control_symbols": "<x>"},
        {"split_by_whitespace": False},
        {"byte_fallback": False},
        {"byte_fallback": False, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False, "user_defined_symbols": "<tag>,\n\n,日x", "unk_id": 3, "pad_id": 0},
    ],
    ids=str,
)
def test_sentencepiece_bpe(seed: int, options: dict[str, Any]) -> None:
    expect_equal(of_sentencepiece(sentencepiece_model(seed, **options)), "<x>", "<tag><tag> <tag>")


def test_control_pieces_reachable_by_merges_remain_text() -> None:
    """A list of all merges would make "ab" the control piece."""
    model = sentencepiece_model(1, control_symbols="ab,ba,<ab>")
    spelled = [text for text in random_lines(1, 200) if "ab" in text]
    assert len(spelled) > 10
    expect_equal(of_sentencepiece(model), *spelled)
    ids = build_engine(of_sentencepiece(model), INT32)[0].encode(array(spelled))[0]
    assert not any(map(model.is_control, ids.tolist()))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", [{}, {"prefix": True}, {"normalizer": "NFC"}, {"specials": True}], ids=str)
@pytest.mark.parametrize("specials_are_text", [True, False])
def test_byte_level(seed: int, options: dict[str, Any], specials_are_text: bool) -> None:
    model = Tokenizer.from_str(byte_level_model(seed, **options).to_str())
    model.encode_special_tokens = specials_are_text
    expect_equal(of_huggingface(model), "a<s>b</s> <|endoftext|>\u0338 c", "\u1abf\u0301a\u0897 \U00010efd")


@pytest.mark.parametrize("pattern", SPLITS)
def test_split_by_expression_then_byte_level(pattern: str) -> None:
    expect_equal(of_huggingface(byte_level_model(4, pattern)))
    expect_equal(of_huggingface(byte_level_model(5, pattern, specials=True, normalizer="NFC")))


@pytest.mark.parametrize("prepend_scheme", ["always", "first", "never", None])
def test_metaspace_and_llama_2(prepend_scheme: str | None) -> None:
    expect_equal(of_huggingface(metaspace_model(1, prepend_scheme)), "<s>a</s>", " <s> a")


def test_added_tokens_that_strip_spaces() -> None:
    model = Tokenizer.from_str(byte_level_model(1).to_str())
    model.add_tokens([AddedToken("<mask>", lstrip=True, normalized=False), AddedToken("<r>", rstrip=True)])
    expect_equal(of_huggingface(model), "a <mask> b", "  <mask>\n<r>  x", "<r><mask>")


@pytest.mark.parametrize("special_tokens", ["text", "tokens"])
def test_tiktoken_v2(special_tokens: str, tmp_path: Path) -> None:
    """Ids with tokens that no merges lead to, and with equal merges that overlap."""
    tokens = [bytes([byte]) for byte in range(256)]
    written = {character: byte for byte, character in enumerate(byte_characters())}
    entries = byte_level_model(3, TikTokenizer.PATTERNS["v2"]).get_vocab()
    tokens += [bytes(map(written.__getitem__, entry)) for entry, place in entries.items() if place > 258]
    tokens += [b"xyzzyplugh", b"\n" * 5, b"aaa", b"aa", b"ababa", b"aba", b"ba"]
    tokens = [token for token in dict.fromkeys(tokens) if token]
    path = tmp_path / "tokens.json"
    lines = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for r, t in enumerate(tokens)]
    path.write_text(json.dumps(lines))
    files = TokenizerFiles(
        str(path), vocab_size=len(tokens) + 20, tiktoken_num_special_tokens=20, special_tokens=special_tokens
    )
    rng = random.Random(1)
    overlaps = ["".join(rng.choices("ab", k=12)) for _ in range(100)]
    expect_equal(build_tokenizer("TikTokenizer", files), "xyzzyplugh", "a<s>b <SPECIAL_7></s>", *overlaps)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: of_sentencepiece(sentencepiece_model(1, model_type="unigram")), "not BPE"),
        (lambda: of_sentencepiece(sentencepiece_model(1, treat_whitespace_as_suffix=True)), "escape spaces"),
        (lambda: of_sentencepiece(changed(sentencepiece_model(1), unused_piece)), "unused"),
        (lambda: of_sentencepiece(changed(sentencepiece_model(1), equal_scores)), "equal score"),
        (lambda: of_sentencepiece(changed(sentencepiece_model(1), unknown_character)), "not pieces"),
        (lambda: of_huggingface(byte_level_model(1, normalizer="NFKC")), "normalizer is NFKC"),
        (lambda: of_huggingface(byte_level_model(1, r"\w+|\W+")), "gigatoken rejects it"),
        (lambda: of_huggingface(with_changes(replaces_runs)), "gigatoken rejects it"),
        (lambda: of_huggingface(with_changes(merges_bytes)), "merges bytes"),
        (lambda: of_huggingface(with_changes(lacks_a_byte)), "incomplete"),
        (lambda: of_huggingface(with_changes(whole_words)), "matched in normalized text or as a single word"),
        (lambda: of_huggingface(added("\xa0", "<r>", rstrip=True)), "spaces that other added tokens strip"),
        (lambda: of_huggingface(added("e\u0301", "e", special=True)), "gigatoken produces other ids"),
        (lambda: of_huggingface(with_changes(splits_digits)), "pre-tokenizer is Digits and ByteLevel"),
        (lambda: of_huggingface(with_changes(has_suffix)), "end_of_word_suffix"),
    ],
)
def test_unsupported_tokenizers_use_the_plain_engine(make: Callable[[], Any], reason: str) -> None:
    subject = make()
    engine, message = build_engine(subject, INT32)
    assert engine.name == "plain" and reason in message
    batch = ["", "ab  cd\n\n12", *random_lines(3, 5)]
    assert engine.encode(array(batch))[0].tolist() == [token for text in batch for token in subject.encode(text)]


def unused_piece(proto: Any) -> None:
    next(piece for piece in proto.pieces if len(piece.piece) > 2 and piece.type == piece.NORMAL).type = 5


def equal_scores(proto: Any) -> None:
    first, second, *_ = (piece for piece in proto.pieces if len(piece.piece) > 1 and piece.type == piece.NORMAL)
    second.score = first.score


def unknown_character(proto: Any) -> None:
    next(piece for piece in proto.pieces if len(piece.piece) > 2 and piece.type == piece.NORMAL).piece = "a♥"


def with_changes(change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    """A model like Llama 2's, or for some changes GPT-2's, with its settings changed."""
    model = byte_level_model(1) if change in (whole_words, splits_digits, has_suffix) else metaspace_model(1, None)
    content = json.loads(model.to_str())
    change(content)
    return Tokenizer.from_str(json.dumps(content))


def replaces_runs(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[ab]{2,}"}, "content": " "}


def merges_bytes(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<0x0A><0x0A>"] = 5000
    content["model"]["merges"].append(["<0x0A>", "<0x0A>"])


def lacks_a_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<0xgg>"] = content["model"]["vocab"].pop("<0xFF>")


def whole_words(content: dict[str, Any]) -> None:
    flags = {"single_word": True, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"].append({"id": 6000, "content": "tag", **flags})


def added(first: str, second: str, *, rstrip: bool = False, special: bool = False) -> Tokenizer:
    """A model in which special tokens are text, with two added tokens: the first is special, or the second strips."""
    model = Tokenizer.from_str(metaspace_model(1, "always").to_str())
    model.add_tokens([AddedToken(second, rstrip=rstrip, normalized=False)])
    (model.add_special_tokens if special else model.add_tokens)([AddedToken(first, normalized=False)])
    model.encode_special_tokens = True
    return model


def splits_digits(content: dict[str, Any]) -> None:
    steps = [{"type": "Digits", "individual_digits": True}, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def has_suffix(content: dict[str, Any]) -> None:
    content["model"]["end_of_word_suffix"] = "</w>"


def test_missing_gigatoken_package_selects_the_plain_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken.gigatoken_rs", None)
    engine, reason = build_engine(of_huggingface(byte_level_model(1)), INT32)
    assert engine.name == "plain" and reason == "the package gigatoken is not installed"


def test_overlapping_merges_are_probed() -> None:
    assert overlap_probes([("a", "aa"), ("aa", "a"), ("x", "y"), ("ab", "c"), ("a", "bc")]) == ("aaaa", "aaaaa")


class Wrong(Subject):
    """A tokenizer that disagrees with gigatoken on texts that hold ``wrong``."""

    def __init__(self, wrong: str) -> None:
        model = byte_level_model(1)

        def encode(text: str) -> Sequence[int]:
            return [7] if wrong in text else model.encode(text).ids

        super().__init__(encode, lambda: huggingface_fast_model(model))


def test_difference_in_a_probe_selects_the_plain_engine() -> None:
    engine, reason = build_engine(Wrong("lazy dogs"), INT32)  # type: ignore[arg-type]
    assert engine.name == "plain" and "gigatoken produces other ids for 'The quick" in reason


def test_difference_in_a_sample_stops_the_job() -> None:
    def engine() -> Any:
        return build_engine(Wrong("zebra"), INT32)[0]  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"--tokenizer-model subject.*token 0 \(.* instead of .*7\)") as caught:
        engine().encode(array(["a zebra"]))
    assert "--no-use-gigatoken" in str(caught.value)
    sampled = []
    late = engine()
    for number in range(3 * engines.DENSE):
        try:
            late.encode(array(["a zebra" if number else "a"]))
        except ConfigError:
            sampled.append(number)
    assert sampled == [1, 2, 4, 8, engines.DENSE, 2 * engines.DENSE], "densest at first, and never ending"


def test_cache_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth is simulated: in a worker that ran other tests, freed memory absorbs the growth of a small cache."""
    resident = itertools.count(0, engines.MAX_CACHE // 2)
    monkeypatch.setattr(engines, "_resident_bytes", lambda: next(resident))
    engine: Any = build_engine(of_huggingface(byte_level_model(1)), INT32)[0]
    used = []
    for _ in range(6):
        used.append(engine.gigatoken)
        for got, wanted in zip(engine.encode(array(HARD)), engine.plain.encode(array(HARD)), strict=True):
            assert got.tolist() == wanted.tolist()
    assert [tokenizer is used[0] for tokenizer in used] == [True] * 3 + [False] * 3, "emptied once it exceeds its share"


@pytest.mark.slow
def test_cache_is_bounded_over_millions_of_pre_tokens() -> None:
    engine: Any = build_engine(of_huggingface(byte_level_model(1)), INT32)[0]
    most = fill(engine, 4_000_000)
    assert most < 2 * engines.MAX_CACHE + (64 << 20), f"{most:,} bytes; without a bound they grow to 600 MB"


def fill(engine: GigatokenEngine, words: int) -> int:
    """Encode distinct pre-tokens and return the maximum memory growth of the process after a batch, in bytes."""
    first = engine.gigatoken
    process, batch = psutil.Process(), 20_000
    engine.encode(array(["start"]))
    before, most = process.memory_info().rss, 0
    for begin in range(0, words, batch):
        text = " ".join(np.base_repr(number * 2_654_435_761 % (1 << 44), 26) for number in range(begin, begin + batch))
        engine.encode(array([text.translate(LETTERS)]))
        most = max(most, process.memory_info().rss - before)
    assert engine.gigatoken is not first, "the cache was never emptied"
    return most


LETTERS = str.maketrans("0123456789", "qrstuvwxyz")


def test_vocabulary_with_huge_id_uses_the_plain_engine() -> None:
    """It would allocate 16 bytes for each id up to the highest, and end the process if that fails."""
    subject = of_huggingface(byte_level_model(1))
    subject.vocab_size = 1 << 30
    engine, reason = build_engine(subject, INT32)
    assert engine.name == "plain" and "its highest id is 1073741823" in reason


def test_id_beyond_the_dtype_is_a_document_error() -> None:
    def unsupported() -> FastModel:
        raise UnsupportedTokenizer("a stand-in")

    subject: Any = Subject(lambda text: [1 << 16], unsupported)
    with pytest.raises(OverflowError, match="65536, stored as uint16"):
        build_engine(subject, np.dtype(np.uint16))[0].encode(array(["word"]))
