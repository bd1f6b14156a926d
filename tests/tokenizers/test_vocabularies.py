"""Vocabulary sizes with unused ids, sources of the end-of-document token, and tokenizer flags of all commands."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import preprocess_data
from megatron_slm.config.recipe import settings
from megatron_slm.config.schema import ModelConfig
from megatron_slm.model.size import padded_vocab_size
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.corpus_files import run_tool
from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOKENIZER_FLAGS = {
    f"--{setting.name.replace('_', '-')}" for group, setting, _ in settings() if group == "tokenizer"
} | {"--vocab-size"}


def tokenizer_json(directory: Path, change: Any = None) -> Path:
    """Write a modified copy of the fixture's tokenizer.json and return its path."""
    content = json.loads((FIXTURES / "huggingface/tokenizer.json").read_text(encoding="utf-8"))
    if change is not None:
        change(content)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def with_rare_token(content: dict[str, Any]) -> None:
    """Assign the last token an id far above the others."""
    vocab = content["model"]["vocab"]
    vocab[max(vocab, key=vocab.__getitem__)] = 60_000


def test_tokenizer_json_with_unused_ids_has_highest_id_plus_one_as_size(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    path = tokenizer_json(tmp_path, with_rare_token)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(path)))
    assert tokenizer.vocab_size == 60_001 and tokenizer.decode([60_000])
    with pytest.raises(
        ConfigError, match=r"--vocab-size 60000 is below the size .*highest id is 60000.*at least 60001"
    ):
        build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(path), vocab_size=60_000))
    assert build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(path), vocab_size=70_000)).vocab_size == 60_001


@pytest.mark.parametrize("declared", [5000, 650])
def test_added_token_with_undeclared_id_is_rejected(tmp_path: Path, declared: int) -> None:
    def change(content: dict[str, Any]) -> None:
        with_rare_token(content)
        content["added_tokens"].append({**content["added_tokens"][0], "id": declared, "content": "<new>"})

    path = tokenizer_json(tmp_path, change)
    with pytest.raises(ConfigError, match=rf"'<new>' with id {declared}, but the tokenizers library loads it with id"):
        build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(path), eod_id=1))


@pytest.mark.parametrize(("declared", "refused"), [("7", True), ("2", False)])
def test_tokenizer_config_ids_are_compared_with_loaded_ids(tmp_path: Path, declared: str, refused: bool) -> None:
    tokenizer_json(tmp_path)
    decoder = {declared: {"content": "</s>"}, "9000": {"content": "<not there>"}, "3": None}
    settings = {"eos_token": "</s>", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if refused:
        with pytest.raises(ConfigError, match=r"tokenizer_config.json declares the .* '</s>' with id 7, but .* 2"):
            build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path)))
    else:
        assert build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path))).eod == 2


def test_gpt2_vocabulary_with_unused_ids(tmp_path: Path) -> None:
    vocab = json.loads((FIXTURES / "gpt2/vocab.json").read_text(encoding="utf-8"))
    rare = max(vocab, key=vocab.__getitem__)
    vocab[rare] = 5000
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    files = TokenizerFiles(vocab=str(tmp_path / "vocab.json"), merges=str(FIXTURES / "gpt2/merges.txt"))
    assert build_tokenizer("GPT2BPETokenizer", files).vocab_size == 5001


def test_tiktoken_vocabulary_with_unused_ranks_and_larger_eod_id(tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    ranks = [*range(256), 900]
    tokens = [*(bytes([byte]) for byte in range(256)), b"ab"]
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in zip(tokens, ranks, strict=True)]
    path.write_bytes(b"".join(lines))
    built = [
        build_tokenizer("TikTokenizer", TokenizerFiles(str(path), eod_id=eod)) for eod in (None, 1500, 400, ord("b"))
    ]
    assert [(tokenizer.vocab_size, tokenizer.eod) for tokenizer in built] == [
        *((902, 901), (1501, 1500), (901, 400), (901, ord("b")))
    ]
    assert all(tokenizer.encode("ab") == [900] for tokenizer in built)


def test_ids_beyond_the_corpus_dtype_are_rejected(tmp_path: Path) -> None:
    def with_huge_id(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        vocab[max(vocab, key=vocab.__getitem__)] = 1 << 31

    path = tokenizer_json(tmp_path, with_huge_id)
    with pytest.raises(ConfigError, match=r"tokenizer.json has the id 2147483648, but corpora store ids below"):
        build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(path), eod_id=2))


def test_other_json_file_is_rejected_as_tiktoken_vocabulary(tmp_path: Path) -> None:
    path = tokenizer_json(tmp_path)
    with pytest.raises(ConfigError, match="is not a tiktoken file: it must contain a list of tokens"):
        build_tokenizer("TikTokenizer", TokenizerFiles(str(path)))


def tiktoken_lines(*more: tuple[bytes, int]) -> bytes:
    tokens = [*((bytes([byte]), byte) for byte in range(256)), *more]
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in tokens)


def test_rewritten_tiktoken_file_is_not_read_from_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    for more in ([(b"ab", 256)], [(b"xy", 256), (b"ab", 257)]):
        path.write_bytes(tiktoken_lines(*more))
        assert build_tokenizer("TikTokenizer", TokenizerFiles(str(path))).encode("ab") == [255 + len(more)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiktoken_lines((b"ab", 7)), "the id 7 is assigned to two tokens"),
        (tiktoken_lines((b"ab", -1)), "the id -1 is negative"),
        (tiktoken_lines() + b"YWI=\n", "line 257 is not a token in base64 and its rank"),
        (tiktoken_lines() + b"Y*I= 300\n", "line 257 is not a token in base64 and its rank"),
        (b"\n", "it contains no tokens"),
    ],
)
def test_damaged_tiktoken_file_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"x.tiktoken is not a tiktoken file: {message}"):
        build_tokenizer("TikTokenizer", TokenizerFiles(str(path)))


@pytest.mark.parametrize("size", [7, 6, 3, 1400])
def test_invalid_special_token_count_is_rejected(size: int) -> None:
    files = TokenizerFiles(str(FIXTURES / "tiktoken.json"), vocab_size=1400, tiktoken_num_special_tokens=size)
    if size == 7:
        assert build_tokenizer("TikTokenizer", files).vocab_size == 407
        return
    with pytest.raises(ConfigError, match=f"--tiktoken-num-special-tokens {size}: must be at least 7 and below"):
        build_tokenizer("TikTokenizer", files)


@pytest.mark.parametrize(
    ("kind", "files", "size"),
    [
        ("SentencePieceTokenizer", TokenizerFiles(str(FIXTURES / "sentencepiece.model")), 700),
        ("ByteTokenizer", TokenizerFiles(), 257),
    ],
)
def test_vocab_size_below_the_tokenizer_is_rejected_and_above_it_pads(
    kind: str, files: TokenizerFiles, size: int
) -> None:
    exact = build_tokenizer(kind, files).vocab_size
    assert exact <= size
    with pytest.raises(ConfigError, match=rf"--vocab-size {exact - 1} is below the size"):
        build_tokenizer(kind, TokenizerFiles(files.model, vocab_size=exact - 1))
    assert build_tokenizer(kind, TokenizerFiles(files.model, vocab_size=9999)).vocab_size == exact
    assert padded_vocab_size(ModelConfig(vocab_size=9999), exact, 2) == 10_240
    assert padded_vocab_size(ModelConfig(), exact, 1) == -(-exact // 128) * 128


ENDS = {  # files next to tokenizer.json, and the end-of-document token or the error
    "text": ({"tokenizer_config.json": {"eos_token": "<s>"}}, "<s>"),
    "object": ({"tokenizer_config.json": {"eos_token": {"content": "<s>", "lstrip": False}}}, "<s>"),
    "separator": ({"tokenizer_config.json": {"eos_token": None, "sep_token": "<s>"}}, "<s>"),
    "map": ({"special_tokens_map.json": {"eos_token": {"content": "<s>"}}}, "<s>"),
    "config before map": (
        {"tokenizer_config.json": {"eos_token": "</s>"}, "special_tokens_map.json": {"eos_token": "<s>"}},
        "</s>",
    ),
    "generation": ({"tokenizer_config.json": {}, "generation_config.json": {"eos_token_id": 1}}, 1),
    "generation list of one": ({"generation_config.json": {"eos_token_id": [2]}}, 2),
    "generation list": ({"generation_config.json": {"eos_token_id": [1, 2]}}, "ambiguous end-of-document id (1, 2)"),
    "generation text": ({"generation_config.json": {"eos_token_id": "1"}}, "eos_token_id is '1', but must be an id"),
    "generation range": ({"generation_config.json": {"eos_token_id": 70_000}}, "id 70000 is outside the vocabulary"),
    "none of several": ({}, "without a declared eos_token: ambiguous end-of-document id"),
    "unknown token": ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, "'<|im_end|>', which is not in the voc"),
    "no content": ({"tokenizer_config.json": {"eos_token": {"lstrip": True}}}, "must be a string or an object"),
    "number": ({"tokenizer_config.json": {"eos_token": 3}}, "eos_token is 3, but must be a string"),
    "not an object": ({"tokenizer_config.json": ["</s>"]}, "must contain a JSON object"),
    "not JSON": ({"tokenizer_config.json": b"{not json"}, "tokenizer_config.json is not JSON"),
    "not UTF-8": ({"tokenizer_config.json": b"\xff\xfe{}"}, "tokenizer_config.json is not JSON"),
}


@pytest.mark.parametrize("case", ENDS)
def test_eod_id_comes_from_the_files_or_the_flag(tmp_path: Path, case: str) -> None:
    beside, expected = ENDS[case]
    tokenizer_json(tmp_path)
    for name, content in beside.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    if isinstance(expected, str) and not expected.startswith("<"):
        with pytest.raises(ConfigError, match=".*".join(map(_escaped, [expected, "--eod-id"]))):
            build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path)))
    else:
        tokenizer = build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path)))
        assert expected in (tokenizer.eod, tokenizer.decode([tokenizer.eod]))
    if case.startswith("not "):  # the remedy is to remove the file
        (tmp_path / "tokenizer_config.json").unlink()
    assert build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path), eod_id=7)).eod == 7


def test_generated_texts_end_with_all_declared_tokens_or_the_given_one(tmp_path: Path) -> None:
    tokenizer_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    eod = build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path))).eod
    for declared, ends in ([7, 8], {eod, 7, 8}), (7, {eod, 7}), (None, {eod}):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
        assert build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path))).end_ids == ends
        assert build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path), eod_id=9)).end_ids == {9}


def _escaped(text: str) -> str:
    return "".join(f"[{character}]" if character in "|.()" else character for character in text)


def test_single_usual_token_name_is_the_eod_token(tmp_path: Path) -> None:
    def only_one(content: dict[str, Any]) -> None:
        text = json.dumps(content).replace('"</s>"', '"<b>"').replace('"<|endoftext|>"', '"<c>"')
        content.update(json.loads(text.replace('"<s>"', '"[SEP]"')))

    tokenizer_json(tmp_path, only_one)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(tmp_path)))
    assert tokenizer.decode([tokenizer.eod]) == "[SEP]"


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("SentencePieceTokenizer", {"model": str(FIXTURES / "sentencepiece.model")}),
        ("TikTokenizer", {"model": str(FIXTURES / "tiktoken.json"), "vocab_size": 1400}),
        ("GPT2BPETokenizer", {"vocab": str(FIXTURES / "gpt2/vocab.json"), "merges": str(FIXTURES / "gpt2/merges.txt")}),
        ("NullTokenizer", {"vocab_size": 400}),
        ("ByteTokenizer", {}),
    ],
)
def test_eod_id_flag_applies_to_every_tokenizer(kind: str, files: dict[str, Any]) -> None:
    tokenizer, plain = (build_tokenizer(kind, TokenizerFiles(**files, eod_id=eod)) for eod in (17, None))
    assert tokenizer.eod == 17 != plain.eod
    assert tokenizer.unique_identifiers != plain.unique_identifiers
    with pytest.raises(ConfigError, match="end-of-document id 70000 is outside the vocabulary"):
        build_tokenizer(kind, TokenizerFiles(**files, eod_id=70_000))


@pytest.mark.parametrize("tool", ["preprocess_data", "score_corpus", "inspect_dataset", "benchmark_preprocess"])
def test_every_tool_accepts_the_tokenizer_flags(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_tool(monkeypatch, capsys, tool, ["--help"])
    assert code == 0
    assert {flag for flag in TOKENIZER_FLAGS if f"{flag} " in out} == TOKENIZER_FLAGS


def test_contradicting_tokenizer_flags_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "1 2"}\n')
    base = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out")]
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]
    for flags, message in (
        ([*null, "--eod-id", "3", "--null-tokenizer-eod-id", "4"], "--eod-id 3 contradicts --null-tokenizer-eod-id 4"),
        (["--tokenizer-type", "ByteTokenizer", "--null-tokenizer-eod-id", "4"], "has no effect with"),
        ([*null, "--eod-id", "-1"], "--eod-id is -1"),
        (
            ["--tokenizer-type", "TikTokenizer", "--tiktoken-pattern", "v3"],
            "--tiktoken-pattern must be one of v1, v2",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            preprocess_data.make_job(preprocess_data.parse_arguments([*base, *flags]))
    job = preprocess_data.make_job(preprocess_data.parse_arguments([*base, *null, "--null-tokenizer-eod-id", "4"]))
    assert job.tokenizer_files.eod_id == 4


def test_copied_tokenizer_has_the_same_identity(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "huggingface", tmp_path / "copy")
    built = [
        build_tokenizer("HuggingFaceTokenizer", TokenizerFiles(str(path)))
        for path in (FIXTURES / "huggingface", tmp_path / "copy")
    ]
    assert built[0].unique_identifiers == built[1].unique_identifiers
