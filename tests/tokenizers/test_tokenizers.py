"""Tokenizers: Megatron-LM's file formats, round trips, special tokens and error messages."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Model

from megatron_slm.corpus.checks import check_tokenizer
from megatron_slm.preprocessing.engines import build_engine
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import KINDS, TikTokenizer, Tokenizer, TokenizerFiles, build_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
FILES = {
    "SentencePieceTokenizer": TokenizerFiles(str(FIXTURES / "sentencepiece.model")),
    "GPTSentencePieceTokenizer": TokenizerFiles(str(FIXTURES / "sentencepiece.model")),
    "Llama2Tokenizer": TokenizerFiles(str(FIXTURES / "sentencepiece.model")),
    "HuggingFaceTokenizer": TokenizerFiles(str(FIXTURES / "huggingface")),
    "GPT2BPETokenizer": TokenizerFiles(
        vocab=str(FIXTURES / "gpt2/vocab.json"), merges=str(FIXTURES / "gpt2/merges.txt")
    ),
    "TikTokenizer": TokenizerFiles(str(FIXTURES / "tiktoken.json"), vocab_size=1400),
    "ByteTokenizer": TokenizerFiles(),
    "NullTokenizer": TokenizerFiles(vocab_size=500),
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60)


def build(kind: str) -> Tokenizer:
    return build_tokenizer(kind, FILES[kind])


def test_every_tokenizer_type_is_tested() -> None:
    assert FILES.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "NullTokenizer"])
def test_encode_decode_round_trip(kind: str) -> None:
    tokenizer = build(kind)

    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def run(text: str) -> None:
        ids = tokenizer.encode(text)
        if kind == "HuggingFaceTokenizer":  # its post-processor adds special tokens
            assert tokenizer.decode([ids[0], ids[-1]]) == "<s></s>"
            ids = ids[1:-1]
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)

    run()


def test_null_tokenizer_parses_ids() -> None:
    tokenizer = build("NullTokenizer")
    assert tokenizer.encode("3 499 0") == [3, 499, 0] and tokenizer.decode([3, 499, 0]) == "3 499 0"
    assert (tokenizer.vocab_size, tokenizer.eod) == (500, 499)


@pytest.mark.parametrize(
    ("kind", "eod", "vocab_size"),
    [("SentencePieceTokenizer", "</s>", 700), ("HuggingFaceTokenizer", "</s>", 700), ("TikTokenizer", "</s>", 1400)],
)
def test_eod_id_and_vocabulary_size(kind: str, eod: str, vocab_size: int) -> None:
    tokenizer = build(kind)
    assert tokenizer.vocab_size <= vocab_size
    model = tokenizer.model  # type: ignore[attr-defined]
    known = {
        "SentencePieceTokenizer": lambda: model.piece_to_id(eod),
        "HuggingFaceTokenizer": lambda: model.token_to_id(eod),
        "TikTokenizer": lambda: model.encode_single_token(eod),
    }
    assert tokenizer.eod == known[kind]()


def test_tokenizers_without_gigatoken_model_use_the_plain_engine() -> None:
    for kind in FILES:
        engine, reason = build_engine(build(kind), np.dtype(np.uint16))
        assert engine.name == ("plain" if kind in ("ByteTokenizer", "NullTokenizer") else "gigatoken"), reason
        ids, lengths = engine.encode(pa.array(["1 2", "", "3"], pa.large_string()))
        wanted = [build(kind).encode(text) for text in ("1 2", "", "3")]
        assert ids.tolist() == [token for text in wanted for token in text] and lengths.tolist() == list(
            map(len, wanted)
        )


@pytest.mark.parametrize(
    ("kind", "special"),
    [
        *(("SentencePieceTokenizer", "</s>"), ("HuggingFaceTokenizer", "</s>"), ("GPT2BPETokenizer", "<|endoftext|>")),
        ("TikTokenizer", "</s>"),
    ],
)
def test_special_tokens_in_texts_are_encoded_as_text_or_tokens(kind: str, special: str) -> None:
    text = build(kind)
    tokens = build_tokenizer(kind, replace(FILES[kind], special_tokens="tokens"))
    around = [token for token in text.encode("") if token in text.special_ids]
    plain = [token for token in text.encode(f"a{special}b") if token not in around]
    assert not text.special_ids & set(plain) and text.decode(plain) == f"a{special}b"
    found = tokens.encode(f"a{special}b")
    inner = found[len(around) // 2 : len(found) - len(around) // 2]
    assert inner.count(text.eod) == 1 and len(inner) < len(plain)
    assert tokens.encode("ab") == text.encode("ab")


def test_sentencepiece_between_special_tokens_matches_megatron_lm() -> None:
    """Each part is encoded separately, without the dummy-prefix space after a special token."""
    files = replace(FILES["SentencePieceTokenizer"], special_tokens="tokens")
    model = (tokenizer := build_tokenizer("SentencePieceTokenizer", files)).model  # type: ignore[attr-defined]
    first, second = model.encode("ab"), model.encode("zq c")
    expected = [*first, 2, *(second[1:] if model.id_to_piece(second[0]) == "▁" else second), 1]
    assert tokenizer.encode("ab</s>zq c<s>") == expected


@pytest.mark.parametrize("kind", ["ByteTokenizer", "NullTokenizer"])
def test_special_tokens_flag_is_rejected_without_special_tokens(kind: str) -> None:
    with pytest.raises(ConfigError, match="--special-tokens-in-text tokens has no effect"):
        build_tokenizer(kind, replace(FILES[kind], special_tokens="tokens"))


def test_tokenizer_json_truncation_and_padding_are_disabled(tmp_path: Path) -> None:
    model = Model.from_file(str(FIXTURES / "huggingface/tokenizer.json"))
    model.enable_truncation(4)
    model.enable_padding(length=50)
    model.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(FIXTURES / "huggingface/tokenizer_config.json", tmp_path)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path)))
    text = "one two three " * 9
    assert tokenizer.encode(text) == build("HuggingFaceTokenizer").encode(text)
    engine, _ = build_engine(tokenizer, np.dtype(np.uint16))
    assert engine.encode(pa.array([text], pa.large_string()))[0].tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("declared", "eod"),
    [
        ({"eos_token": "<s>"}, "<s>"),
        ({"eos_token": {"content": "<s>", "lstrip": False}}, "<s>"),
        ({"eos_token": None, "sep_token": "<s>"}, "<s>"),
    ],
)
def test_declared_eos_token_is_the_eod_token(tmp_path: Path, declared: dict[str, object] | None, eod: str) -> None:
    shutil.copy(FIXTURES / "huggingface/tokenizer.json", tmp_path)
    if declared is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path)))
    assert tokenizer.decode([tokenizer.eod]) == eod


def test_the_bos_token_is_the_declared_one(tmp_path: Path) -> None:
    assert build("SentencePieceTokenizer").bos == 1 and build("ByteTokenizer").bos is None
    shutil.copy(FIXTURES / "huggingface/tokenizer.json", tmp_path)
    files = TokenizerFiles(str(tmp_path), eod_id=2)
    assert build_tokenizer("HuggingFaceTokenizer", files).bos is None
    for name, token in (("special_tokens_map.json", "</s>"), ("tokenizer_config.json", {"content": "<s>"})):
        (tmp_path / name).write_text(json.dumps({"bos_token": token, "eos_token": "</s>"}))
        tokenizer = build_tokenizer("HuggingFaceTokenizer", files)
        assert tokenizer.bos is not None
        assert tokenizer.decode([tokenizer.bos]) == (token if isinstance(token, str) else token["content"])


def test_plain_encoding_has_no_added_tokens() -> None:
    tokenizer = build("HuggingFaceTokenizer")
    assert tokenizer.encode("some text")[1:-1] == tokenizer.encode_plain("some text")
    assert build("ByteTokenizer").encode_plain("some text") == build("ByteTokenizer").encode("some text")


def test_tiktoken_reads_both_formats(tmp_path: Path) -> None:
    tokens = [base64.b64decode(line["token_bytes"]) for line in json.loads((FIXTURES / "tiktoken.json").read_text())]
    plain = tmp_path / "own.tiktoken"
    plain.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)))
    own = build_tokenizer("TikTokenizer", TokenizerFiles(str(plain)))
    assert (own.vocab_size, own.eod) == (len(tokens) + 1, len(tokens))
    text = "words, and 12345 日本語"
    encoding = tiktoken.Encoding(
        "x",
        pat_str=TikTokenizer.TIKTOKEN_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )
    assert own.encode(text) == encoding.encode_ordinary(text) and own.decode(own.encode(text)) == text
    few = TokenizerFiles(
        str(FIXTURES / "tiktoken.json"), vocab_size=300, tiktoken_pattern="v1", tiktoken_num_special_tokens=10
    )
    tokenizer = build_tokenizer("TikTokenizer", few)
    assert (tokenizer.vocab_size, tokenizer.eod) == (300, 2)
    assert tokenizer.encode("a") == [10 + ord("a")]
    assert tokenizer.fingerprint != build("TikTokenizer").fingerprint


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("SentencePieceTokenizer", "no model", "is not a sentencepiece model"),
        ("HuggingFaceTokenizer", "{}", "is not a tokenizer.json"),
        ("TikTokenizer", "not base64", "is not a tiktoken file"),
        ("TikTokenizer", None, "no such file"),
    ],
)
def test_invalid_files_are_rejected(kind: str, content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(kind, TokenizerFiles(str(path)))


@pytest.mark.parametrize("size", [1100, 1240])
def test_tiktoken_vocabulary_without_all_bytes_is_rejected(size: int) -> None:
    with pytest.raises(ConfigError, match=r"is byte 0x.*increase --vocab-size"):
        build_tokenizer("TikTokenizer", TokenizerFiles(str(FIXTURES / "tiktoken.json"), vocab_size=size))


@pytest.mark.parametrize("size", [None, 1400, 5000])
def test_smaller_vocabulary_than_declared_is_padded(size: int | None) -> None:
    tokenizer = build_tokenizer("TikTokenizer", TokenizerFiles(str(FIXTURES / "tiktoken.json"), vocab_size=size))
    assert tokenizer.vocab_size == 1400


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer"])
def test_corpus_of_another_tokenizer_is_rejected(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one two"}\n')
    job = Job([str(tmp_path / "in.jsonl")], ["text"], str(tmp_path / "out"), kind, FILES[kind])
    preprocess(job)
    check_tokenizer(job.prefix("text"), build(kind), "--data-path")
    for other in ("ByteTokenizer", "TikTokenizer"):
        with pytest.raises(ConfigError, match=rf"--data-path .*was made with {kind}"):
            check_tokenizer(job.prefix("text"), build(other), "--data-path")
