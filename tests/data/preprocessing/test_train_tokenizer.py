"""Training a tokenizer: Llama-like properties of both kinds, and every mistake told with nothing left behind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus_files import run_tool

from megatron_slm.data.preprocessing.train_tokenizer import LONGEST_LINE, TokenizerJob, train_tokenizer
from megatron_slm.data.tokenizers.tokenizer import TokenizerFiles, build_tokenizer
from megatron_slm.runtime.errors import ConfigError

CHANCE = random.Random(1)
WORDS = ["".join(CHANCE.choices("abcdefghij", k=CHANCE.randint(2, 7))) for _ in range(200)]
TEXTS = [" ".join(CHANCE.choices(WORDS, k=30)) + f" {CHANCE.randint(0, 9999)}\n" for _ in range(300)]


def write(path: Path, texts: list[str] = TEXTS) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_is_as_llamas_are(tmp_path: Path, kind: str) -> None:
    model = train_tokenizer(TokenizerJob([write(tmp_path / "in.jsonl")], str(tmp_path / "deep" / "tok"), 400, kind))
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


def test_long_lines_and_a_sample_of_many_are_learned_from(tmp_path: Path) -> None:
    long = " ".join(CHANCE.choices(WORDS, k=LONGEST_LINE))
    model = train_tokenizer(TokenizerJob([write(tmp_path / "in.jsonl", [long])], str(tmp_path / "tok"), 400))
    tokenizer = build_tokenizer("SentencePieceTokenizer", TokenizerFiles(str(model)))
    assert len(tokenizer.encode(long)) < len(long) * 0.6
    job = TokenizerJob([write(tmp_path / "in.jsonl")], str(tmp_path / "sampled"), 300, max_lines=101)
    assert train_tokenizer(job).is_file()


BAD: list[tuple[str, Callable[[Path], Any], list[str], str]] = [
    ("no file", lambda f: None, ["--input", "/nowhere"], "--input /nowhere: there is no such file"),
    ("nothing", lambda f: (f / "in.jsonl").write_text(""), [], "holds no text"),
    ("empty texts", lambda f: write(f / "in.jsonl", ["", "\n"]), [], "holds no text"),
    ("no JSON", lambda f: (f / "in.jsonl").write_text('{"text": "a"}\n{x'), [], "in.jsonl:2: cannot be read"),
    ("no key", lambda f: None, ["--json-key", "body"], "in.jsonl:1: cannot be read ('body')"),
    ("number", lambda f: (f / "in.jsonl").write_text('{"text": 3}'), [], "the value of 'text' is not a text"),
    ("list", lambda f: (f / "in.jsonl").write_text("[1]"), [], "in.jsonl:1: cannot be read"),
    ("not UTF-8", lambda f: (f / "in.jsonl").write_bytes(b'{"text": "\xff"}'), [], "in.jsonl:1: cannot be read"),
    ("too large", lambda f: None, ["--vocab-size", "100000"], "--vocab-size 100000: sentencepiece could not train"),
    ("too small", lambda f: None, ["--vocab-size", "100"], "--vocab-size 100: sentencepiece could not train"),
    ("no vocabulary", lambda f: None, ["--vocab-size", "0"], "--vocab-size is 0, and must be at least 1"),
    ("no lines", lambda f: None, ["--max-lines", "-1"], "--max-lines is -1, and must be at least 101"),
    ("no threads", lambda f: None, ["--threads", "0"], "--threads is 0, and must be at least 1"),
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
    (tmp_path / "tok.model").write_text("a model that was there before")
    damage(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    given = {"--input": source, "--output-prefix": str(tmp_path / "tok"), "--vocab-size": "400", "--threads": "1"}
    given |= dict(zip(words[0::2], words[1::2], strict=True))
    argv = [word for pair in given.items() for word in pair]
    code, _, errors = run_tool(monkeypatch, capsys, "train_tokenizer", argv)
    assert code == 2
    assert message in errors, errors
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_becomes_full_leaves_the_model_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tok.model").write_text("before")

    def full(self: Path, target: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConfigError, match=r"--output-prefix .*No space left"):
        train_tokenizer(TokenizerJob([write(tmp_path / "in.jsonl")], str(tmp_path / "tok"), 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "tok.model"]
