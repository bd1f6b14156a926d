"""Tokenizer training: Llama-like properties of both model types, error messages, and no leftover files."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_slm.preprocessing.train_tokenizer import MAX_LINE, TokenizerJob, train_tokenizer
from megatron_slm.runtime import files
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.corpus_files import run_tool
from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
RNG = random.Random(1)
WORDS = ["".join(RNG.choices("abcdefghij", k=RNG.randint(2, 7))) for _ in range(200)]
TEXTS = [" ".join(RNG.choices(WORDS, k=30)) + f" {RNG.randint(0, 9999)}\n" for _ in range(300)]


def write(path: Path, texts: list[str] = TEXTS) -> str:
    with path.open("w") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_model_has_llama_properties(tmp_path: Path, kind: str) -> None:
    model = train_tokenizer(
        TokenizerJob([write(tmp_path / "in.jsonl")], str(tmp_path / "deep" / "tok"), 400, kind)
    ).path
    assert model == tmp_path / "deep" / "tok.model"
    assert sorted(path.name for path in model.parent.iterdir()) == ["tok.model", "tok.vocab"]
    tokenizer: Any = build_tokenizer("SentencePieceTokenizer", TokenizerFiles(str(model)))
    pieces = [tokenizer.model.id_to_piece(token) for token in range(400)]
    assert tokenizer.vocab_size == 400 and tokenizer.eod == 2
    assert pieces[:3] == ["<unk>", "<s>", "</s>"] and {f"<0x{byte:02X}>" for byte in range(256)} <= set(pieces)
    assert not [
        piece for piece in pieces if not piece.startswith("<") and len(piece.strip("▁")) > 1 and piece[-1].isdigit()
    ]
    for text in ("unseen ünï 🙂 日本", "  kept   spaces ", "line\n\n\tnext\r\n", "12345", " ".join(WORDS[:20])):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("12345")) >= 5
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) * 0.7, "nothing was learned"


def test_training_on_long_lines_and_on_a_sample(tmp_path: Path) -> None:
    long = " ".join(RNG.choices(WORDS, k=MAX_LINE))
    model = train_tokenizer(TokenizerJob([write(tmp_path / "in.jsonl", [long])], str(tmp_path / "tok"), 400)).path
    tokenizer = build_tokenizer("SentencePieceTokenizer", TokenizerFiles(str(model)))
    assert len(tokenizer.encode(long)) < len(long) * 0.6
    job = TokenizerJob([write(tmp_path / "in.jsonl")], str(tmp_path / "sampled"), 300, max_lines=101)
    assert train_tokenizer(job).path.is_file()


BAD: list[tuple[str, Callable[[Path], Any], list[str], str]] = [
    ("no file", lambda f: None, ["--input", "/nowhere"], "--input /nowhere: no such file"),
    ("nothing", lambda f: (f / "in.jsonl").write_text(""), [], "contains no text"),
    ("empty texts", lambda f: write(f / "in.jsonl", ["", "\n"]), [], "contains no text"),
    ("no JSON", lambda f: (f / "in.jsonl").write_text('{"text": "a"}\n{x'), [], "error: {}/in.jsonl:2: not JSON"),
    ("no key", lambda f: None, ["--json-key", "body"], "in.jsonl:1: the key 'body' is missing (--json-keys)"),
    ("number", lambda f: (f / "in.jsonl").write_text('{"text": 3}'), [], "the value of 'text' is not a string"),
    ("list", lambda f: (f / "in.jsonl").write_text("[1]"), [], "error: {}/in.jsonl:1: not a JSON object"),
    ("not UTF-8", lambda f: (f / "in.jsonl").write_bytes(b'{"text": "\xff"}'), [], "error: {}/in.jsonl:1: not UTF-8"),
    ("too large", lambda f: None, ["--vocab-size", "100000"], "could not train: Vocabulary size too high (100000)"),
    ("unknown flag", lambda f: None, ["--vocabsize", "300"], "unknown flag --vocabsize. Did you mean --vocab-size?"),
    ("no number", lambda f: None, ["--vocab-size", "many"], "invalid int value: 'many'"),
    ("too small", lambda f: None, ["--vocab-size", "100"], "--vocab-size 100: sentencepiece could not train"),
    ("surrogate", lambda f: (f / "in.jsonl").write_text('{"text": "\\ud800"}'), [], "in.jsonl:1: a lone surrogate"),
    (
        "damaged",
        lambda f: (f / "in.jsonl").rename(f / "x.parquet"),
        ["--input", "{}/x.parquet"],
        "x.parquet, row 1: the",
    ),
    ("empty prefix", lambda f: None, ["--output-prefix", ""], "--output-prefix is empty"),
    ("directory", lambda f: None, ["--output-prefix", "{}/"], "names a directory. Give a path"),
    ("dot", lambda f: None, ["--output-prefix", "{}/."], "names a directory. Give a path"),
    ("dots", lambda f: None, ["--output-prefix", ".."], "--output-prefix .. names a directory"),
    ("existing directory", lambda f: None, ["--output-prefix", "{}"], "is an existing directory"),
    ("file as directory", lambda f: None, ["--output-prefix", "{}/in.jsonl/tok"], "cannot be written: Not a directory"),
    ("device", lambda f: (f / "x.model").symlink_to("/dev/full"), ["--output-prefix", "{}/x"], "x.model is a device"),
    (
        "foreign",
        lambda f: (f / "y.model").write_text("notes"),
        ["--output-prefix", "{}/y"],
        "y.model exists and was not",
    ),
    ("foreign words", lambda f: (f / "y.vocab").write_text("a\nb\n"), ["--output-prefix", "{}/y"], "y.vocab exists"),
    ("suffix", lambda f: None, ["--output-prefix", "{}/tok.model"], "tok.model: omit .model from the prefix"),
    ("no vocabulary", lambda f: None, ["--vocab-size", "0"], "--vocab-size 0: must be at least 1"),
    ("no lines", lambda f: None, ["--max-lines", "-1"], "--max-lines -1: must be at least 101"),
    ("no threads", lambda f: None, ["--threads", "0"], "--threads 0: must be at least 1"),
    ("kind", lambda f: None, ["--model-type", "wordpiece"], "invalid choice: 'wordpiece'"),
    ("output", lambda f: None, ["--output-prefix", "/proc/tok"], "--output-prefix /proc/tok cannot be written"),
]


@pytest.mark.parametrize(("damage", "words", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    words: list[str],
    message: str,
) -> None:
    source = write(tmp_path / "in.jsonl")
    shutil.copy(FIXTURES / "sentencepiece.model", tmp_path / "tok.model")
    damage(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    given = {"--input": source, "--output-prefix": str(tmp_path / "tok"), "--vocab-size": "400", "--threads": "1"}
    given |= {flag: value.replace("{}", str(tmp_path)) for flag, value in zip(words[0::2], words[1::2], strict=True)}
    argv = [word for pair in given.items() for word in pair]
    code, _, errors = run_tool(monkeypatch, capsys, "train_tokenizer", argv)
    assert code == 2
    assert message.replace("{}", str(tmp_path)) in errors, errors
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("fails", ["write", "sync", "replace"])
def test_full_disk_keeps_the_existing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    before = (FIXTURES / "sentencepiece.model").read_bytes()
    (tmp_path / "tok.model").write_bytes(before)

    def full(*given: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails == "sync":
        monkeypatch.setattr(files, "sync", full)
    else:
        monkeypatch.setattr(Path, {"write": "write_bytes", "replace": "replace"}[fails], full)
    with pytest.raises(ConfigError, match=r"--output-prefix .*No space left"):
        train_tokenizer(TokenizerJob([write(tmp_path / "in.jsonl")], str(tmp_path / "tok"), 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "tok.model"]
    assert (tmp_path / "tok.model").read_bytes() == before


def test_vocabulary_file_matches_sentencepiece(tmp_path: Path) -> None:
    trained = train_tokenizer(TokenizerJob([write(tmp_path / "in.jsonl")], str(tmp_path / "tok"), 300))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "in.jsonl"), model_prefix=str(tmp_path / "own"), vocab_size=300, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained.path))
    lines = (tmp_path / "tok.vocab").read_text(encoding="utf-8").splitlines()
    own = (tmp_path / "own.vocab").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [model.id_to_piece(token) for token in range(300)]
    assert lines[:3] == own[:3]
    again = (tmp_path / "tok.model").read_bytes()
    train_tokenizer(TokenizerJob([write(tmp_path / "in.jsonl")], str(tmp_path / "tok"), 300))
    assert (tmp_path / "tok.model").read_bytes() == again, "an existing model is replaced, and training deterministic"


def test_unreadable_lines_are_skipped_as_in_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    good = [json.dumps({"meta": {"text": text}}) for text in TEXTS]
    source.write_text("\n".join([*good[:5], "{x", "", '{"meta": 3}', '{"meta": {"text": "a\\ud800b"}}', *good[5:]]))
    flags = ["--input", str(source), "--json-keys", "meta.text", "--vocab-size", "300", "--threads", "1"]
    flags += ["--output-prefix", str(tmp_path / "tok")]
    code, out, errors = run_tool(monkeypatch, capsys, "train_tokenizer", [*flags, "--on-error", "skip"])
    assert code == 0 and "(300 pieces), 3 skipped" in out
    for place in (":6: not JSON", ":8: the key 'meta.text' is missing", ":9: a lone surrogate"):
        assert f"skipped {source}{place}" in errors
    more = ["--on-error", "skip", "--lone-surrogates", "replace"]
    code, out, _ = run_tool(monkeypatch, capsys, "train_tokenizer", [*flags, *more])
    assert code == 0 and "2 skipped" in out
    source.write_text("{x\n")
    code, _, errors = run_tool(monkeypatch, capsys, "train_tokenizer", [*flags, "--on-error", "skip"])
    assert code == 2 and f"contains no text that can be read: {source}:1: not JSON" in errors
