"""Corpus metadata: recognition by content under both names, and protection of unrelated files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.corpus.metadata import find_metadata
from megatron_slm.preprocessing.merge import merge_corpora
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.corpus_files import build, run_tool
from megatron_slm.tokenizers.tokenizer import TokenizerFiles

OURS = {"tokenizer": {"name": "ByteTokenizer", "fingerprint": "f", "vocab_size": 257}, "documents": 1, "tokens": 2}


def _directory(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("text")


def _link(path: Path) -> None:
    (path.parent / "raw.txt").write_text('{"text": "a"}\n')
    path.symlink_to("raw.txt")


FOREIGN: list[tuple[str, Callable[[Path], Any]]] = [
    ("directory", _directory),
    ("link", _link),
    ("dangling link", lambda path: path.symlink_to("nowhere")),
    ("text", lambda path: path.write_text('{"text": "one"}\n{"text": "two"}\n')),
    ("bytes", lambda path: path.write_bytes(b"\xff\xfe{}")),
    ("empty", lambda path: path.write_bytes(b"")),
    ("deep", lambda path: path.write_text("[" * 100_000)),
    ("JSON", lambda path: path.write_text('{"tokenizer": {"name": "mine"}}')),
    ("tokenizer.json", lambda path: path.write_text('{"tokenizer": "word"}')),
    ("large", lambda path: path.write_text(json.dumps({**OURS, "text": "a" * (1 << 20)}))),
]
foreign = pytest.mark.parametrize("make", [case[1] for case in FOREIGN], ids=[case[0] for case in FOREIGN])


def state_of(path: Path) -> Any:
    if path.is_symlink():
        return path.readlink(), path.read_bytes() if path.exists() else None
    return path.read_bytes() if path.is_file() else sorted(path.iterdir())


def job(directory: Path, **settings: Any) -> Job:
    text = directory / "in.jsonl"
    if not text.exists():
        text.write_text('{"text": "hello"}\n')
    return Job([str(text)], ["text"], str(directory / "out"), "ByteTokenizer", TokenizerFiles(), **settings)


@foreign
def test_other_file_with_the_former_metadata_name_is_kept(
    tmp_path: Path, make: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "out_text_document.json"
    make(theirs)
    before = state_of(theirs)
    for settings in ({}, {"resume": True}, {"resume": True}):
        preprocess(job(tmp_path, **settings))
        assert state_of(theirs) == before
    found = find_metadata(tmp_path / "out_text_document")
    assert found is not None and found[0].name == "out_text_document.corpus.json"
    code, out, err = run_tool(monkeypatch, capsys, "inspect_dataset", [str(tmp_path / "out_text_document"), "--check"])
    assert code == 0 and "ByteTokenizer" in out, err
    parts = [build(tmp_path / name, [[[1, 2]]], tokenizer="aa") for name in "ab"]
    merge_corpora(parts, str(tmp_path / "out_text_document"))
    merge_corpora([*parts, build(tmp_path / "c", [[[1]]])], str(tmp_path / "out_text_document"))
    assert state_of(theirs) == before
    assert find_metadata(tmp_path / "out_text_document") is None, "one input has no metadata"


@pytest.mark.parametrize("make", [case[1] for case in FOREIGN if case[0] not in ("dangling link", "directory")])
def test_other_file_with_the_metadata_name_is_rejected_before_work(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    theirs = tmp_path / "out_text_document.corpus.json"
    make(theirs)
    before = state_of(theirs)
    with pytest.raises(ConfigError, match="was not written by megatron_slm"):
        preprocess(job(tmp_path))
    with pytest.raises(ConfigError, match="was not written by megatron_slm"):
        merge_corpora([build(tmp_path / "a", [[[1, 2]]], tokenizer="aa")], str(tmp_path / "out_text_document"))
    assert state_of(theirs) == before
    assert not (tmp_path / "out_text_document.bin").exists()
    assert find_metadata(tmp_path / "out_text_document") is None


def test_metadata_under_the_former_name_is_read_and_replaced_with_its_corpus(tmp_path: Path) -> None:
    former = Path(f"{build(tmp_path / 'c', [[[1, 2]]])}.json")
    former.write_text(json.dumps(OURS))
    assert find_metadata(tmp_path / "c") == (former, OURS)
    (tmp_path / "c.corpus.json").write_text(json.dumps({**OURS, "tokens": 3}))
    found = find_metadata(tmp_path / "c")
    assert found is not None and found[1]["tokens"] == 3
    (tmp_path / "c.corpus.json").unlink()
    merge_corpora([build(tmp_path / "a", [[[1]]])], str(tmp_path / "c"))
    assert not former.exists() and find_metadata(tmp_path / "c") is None


def test_finished_job_with_metadata_under_the_former_name_is_not_repeated(tmp_path: Path) -> None:
    preprocess(job(tmp_path, resume=True))
    prefix = tmp_path / "out_text_document"
    Path(f"{prefix}.corpus.json").rename(f"{prefix}.json")
    assert preprocess(job(tmp_path, resume=True)).resumed == 1
    assert not Path(f"{prefix}.corpus.json").exists()
