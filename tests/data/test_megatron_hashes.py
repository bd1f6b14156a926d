"""The same bytes as Megatron-LM's own tool, recorded once by fixtures/record.py, for each kind of tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import nltk
import pytest

from megatron_slm.data.preprocess import preprocess

FIXTURES = Path(__file__).parent / "fixtures"
TOOL = Path(__file__).parent.parent.parent / "tools/preprocess_data.py"
RUNS = json.loads((FIXTURES / "megatron_lm.json").read_text(encoding="utf-8"))["runs"]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("more", [[], ["--no-word-cache"]], ids=["word cache", "plain"])
@pytest.mark.parametrize("run", RUNS, ids=[" ".join(run["flags"]) for run in RUNS])
def test_bytes_are_those_of_megatron_lms_tool(
    run: dict[str, Any], more: list[str], tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    flags = ["--input", "corpus.jsonl", "--output-prefix", "out", *run["flags"], *more]
    preprocess(tool.make_job(tool.parse_arguments(flags)))
    for name, wanted in run["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == wanted, name
    assert len(run["sha256"]) in (2, 4)
