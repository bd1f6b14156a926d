"""Bytes identical to those of Megatron-LM's tool, recorded by fixtures/record.py, for each tokenizer type."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import nltk
import pytest

from megatron_slm.cli import preprocess_data
from megatron_slm.preprocessing.preprocess import preprocess

FIXTURES = Path(__file__).parent.parent / "fixtures"
RUNS = json.loads((FIXTURES / "megatron_lm.json").read_text(encoding="utf-8"))["runs"]


@pytest.mark.parametrize("more", [[], ["--no-use-gigatoken"]], ids=["gigatoken", "plain"])
@pytest.mark.parametrize("run", RUNS, ids=[" ".join(run["flags"]) for run in RUNS])
def test_bytes_match_megatron_lm_tool(
    run: dict[str, Any], more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    flags = ["--input", "corpus.jsonl", "--output-prefix", "out", *run["flags"], *more]
    if run["flags"][1] in ("HuggingFaceTokenizer", "GPT2BPETokenizer", "TikTokenizer"):
        flags += ["--special-tokens-in-text", "tokens"]  # Megatron-LM's behavior
    if run["flags"][1] == "NullTokenizer":  # the numbers exceed the recorded size, which Megatron-LM does not check
        flags += ["--vocab-size", "300000", "--eod-id", "69999"]
    preprocess(preprocess_data.make_job(preprocess_data.parse_arguments(flags)))
    for name, wanted in run["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == wanted, name
    assert len(run["sha256"]) in (2, 4)
