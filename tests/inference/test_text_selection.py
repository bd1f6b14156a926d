"""Test tools/show_selection.py: losses equal those of corpus scoring, and the selection that of the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.cli import score_corpus, show_selection
from megatron_slm.inference.texts import encode_texts, read_texts, token_texts
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.sidecar import Sidecar, read_header, sidecar_path
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import Outcome, captured
from megatron_slm.tokenizers.base import TokenizerFiles
from megatron_slm.tokenizers.plain_tokenizers import ByteTokenizer
from megatron_slm.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

MODEL = Path(__file__).parent.parent / "fixtures" / "sentencepiece.model"
TOKENIZERS = [ByteTokenizer(TokenizerFiles()), SentencePieceTokenizer(TokenizerFiles(model=str(MODEL)))]
LENGTHS = {tokenizer.name: tokenizer.byte_lengths() for tokenizer in TOKENIZERS}
LONG = "abc def \u00e9\U0001f600 gah bed cab. " * 9  # several windows of 64 tokens
TEXTS = [LONG, "", "fed"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
@pytest.mark.parametrize("has_lengths", [True, False])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_texts_of_tokens_add_up_to_the_text(tokenizer: Any, has_lengths: bool, data: st.DataObject) -> None:
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
    if ids := tokenizer.encode(text):
        pieces = token_texts(tokenizer, ids, LENGTHS[tokenizer.name] if has_lengths else None)
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    assert token_texts(TOKENIZERS[0], list("a😀b".encode()), LENGTHS["ByteTokenizer"]) == ["a", "", "", "", "😀", "b"]


def test_unreadable_texts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for content, message in ((b"a\nb\xff", r"line 2: byte 3 \(0xff\) is not UTF-8"), (b"\xef\xbb\xbf", "is empty")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            encode_texts(TOKENIZERS[0], read_texts(str(path), None), append_eod=True)
    path.write_text('{"body": "a"}\n')
    assert read_texts(str(path), "body") == [(f"{path}:1", "a")]
    for key, message in (("text", "the key 'text' is missing"), ("body", "")):
        if message:
            with pytest.raises(ConfigError, match=message):
                read_texts(str(path), key)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_texts(str(tmp_path), None)


def test_texts_without_a_token_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers of the texts that remain are not those of the lines."""
    texts = [("f:1", "a"), ("f:2", ""), ("f:3", "bc"), ("f:5", "")]
    encoded = encode_texts(TOKENIZERS[0], texts, append_eod=True)
    assert encoded.starts == [0, 2, 5]
    assert "2 of 4 texts have no token and are left out, the first at f:2" in capsys.readouterr().err
    encode_texts(TOKENIZERS[0], texts[:1], append_eod=True)
    assert not capsys.readouterr().err


def _run(rank: int, world_size: int, commands: list[list[str]], scoring: list[str]) -> list[Outcome]:
    """Score a corpus, and show the selections of several command lines, in one process."""
    return [
        captured(scoring, score_corpus.main),
        *(captured(command, show_selection.main) for command in commands),
    ]


def _refusals(directory: Path, source: Path, theta: str, models: list[str], good: list[str]) -> dict[str, list[str]]:
    """Return command lines that are refused, by a part of the message."""
    (directory / "cut").mkdir()
    (directory / "foreign.json").write_text("[]")
    (directory / "empty.txt").write_text("")
    (directory / "input.json").write_text('{"kind": "selection", "text": "of an earlier result"}')
    return {
        "cut: not a checkpoint": ["--load", str(directory / "cut"), "--input", str(source)],
        "step 7 (--ckpt-step) does not exist": ["--load", f"{theta}:7", "--input", str(source)],
        "needs a reference model": ["--load", theta, "--input", str(source)],
        "foreign.json exists and was not": [*models, *good, "--json", str(directory / "foreign.json")],
        "holds no text": [*models, "--input", str(directory / "empty.txt"), "--json-key", "text"],
        "it has no token to score": [*models, "--input", str(directory / "empty.txt")],
        "must be at most 64": [*models, *good, "--seq-length", "65"],
        "are the same file": [
            *models,
            *good,
            "--html",
            str(directory / "a"),
            "--json",
            str(directory / "cut" / ".." / "a"),
        ],
        "input.json is the file of --input": [
            *("--load", theta, "--input", str(directory / "input.json"), "--json", str(directory / "input.json")),
        ],
        "every term of --slm-score 'token-loss:0.5' has a ratio": [*models, *good, "--slm-score", "token-loss:0.5"],
        "either --all-steps or --ckpt-step": [*models, *good, "--all-steps", "--ckpt-step", "0"],
        "--reference-precision has no effect": ["--load", theta, *good, "--reference-precision", "fp32"],
        "must be in (0, 1]": [*models, *good, "--slm-selection-ratio", "1.5"],
        "model was trained with": [*models, *good, "--tokenizer-type", "NullTokenizer", "--vocab-size", "300"],
    }


def test_losses_and_selection_of_a_text(tmp_path: Path, checkpoints: dict[str, str]) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    job = Job([str(source)], ["text"], str(tmp_path / "corpus"), "ByteTokenizer", TokenizerFiles(), append_eod=True)
    preprocess(job)
    prefix = job.prefix("text")
    theta, rm = checkpoints["random"], checkpoints["trained"]
    models = ["--load", theta, f"{rm}:10", "--reference-load", rm]
    good = ["--input", str(source), "--append-eod", "--stride", "48", "--slm-selection-ratio", "0.3"]
    files = ["--json", str(tmp_path / "s.json"), "--html", str(tmp_path / "s.html"), "--table"]
    entropy = ["--json", str(tmp_path / "e.json"), "--slm-score", "reference-entropy:0.2 or token-loss:0.1"]
    refused = _refusals(tmp_path, source, theta, models, good)
    scoring = ["--reference-load", rm, "--data-path", prefix, "--reference-scores", "rm", "--stride", "48"]
    own_ratios = [word for word in good if word not in ("--slm-selection-ratio", "0.3")]
    commands = [[*models, *good, *files], [*models, *own_ratios, *entropy], *refused.values()]
    scored, shown, by_entropy, *failures = run_ranks(_run, 1, commands, scoring, initialize=False)[0]
    for outcome in (scored, shown, by_entropy):
        assert outcome.code == 0, outcome.errors
    for outcome, message in zip(failures, refused, strict=True):
        assert outcome.code == 2 and message in outcome.errors, (message, outcome)

    content = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert "".join(content["token_texts"]) == "".join(TEXTS)
    path = sidecar_path(prefix, "rm")
    header = read_header(path)
    assert np.allclose(content["reference_loss"], Sidecar(path, header).losses(0, header.tokens), atol=1e-3)
    first, second = content["checkpoints"]
    assert np.allclose(second["token_loss"], content["reference_loss"], atol=1e-4)  # the reference model itself
    excess = np.array(first["excess_loss"])
    count = int(np.ceil(0.3 * len(excess)))
    assert sum(first["selected"]) == count
    assert excess[np.array(first["selected"]) == 1].min() >= np.sort(excess)[-count] - 1e-4
    assert shown.output.count("\n") > 2 * len(excess) and "selected" in shown.output

    content = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert content["checkpoints"][0]["slm_selection_ratio"] is None and "k = " not in by_entropy.output
    assert min(content["reference_entropy"]) >= 0 and max(content["reference_entropy"]) <= np.log(257) + 1e-3
    lowest = np.argsort(content["reference_entropy"], kind="stable")[: int(np.ceil(0.2 * len(excess))) - 1]
    assert np.array(content["checkpoints"][0]["selected"])[lowest].all()
