"""Corpora: what is written is what Megatron-Core's own builder writes and reads, for every input and tokenizer kind."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_slm.data.corpus import check_corpus, check_tokenizer
from megatron_slm.data.preprocess import Job, preprocess
from megatron_slm.data.tokenizer import TokenizerFiles, build_tokenizer
from megatron_slm.data.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_slm.runtime.errors import ConfigError

TEXTS = ["one two three", "naïve ▁ 日本語 🙂\n\tx", "", "a" * 500, "  spaces   kept "]
TOOLS = Path(__file__).parent.parent.parent / "tools"


def write(path: Path, texts: list[str]) -> Path:
    content = "\n".join(json.dumps({"text": text, "title": text[:3]}) for text in texts).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(pack.get(path.suffix, bytes)(content))
    return path


def job(source: Path, prefix: Path, **more: object) -> Job:
    return Job([str(source)], ["text"], str(prefix), "ByteTokenizer", TokenizerFiles(), **more)  # type: ignore[arg-type]


def documents(prefix: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices
    return [
        [int(token) for place in range(first, last) for token in dataset[place]]
        for first, last in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_are_those_of_megatrons_builder(tmp_path: Path, suffix: str, workers: int) -> None:
    ours = job(write(tmp_path / f"in{suffix}", TEXTS), tmp_path / "ours", append_eod=True, workers=workers)
    preprocess(ours)
    builder = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=check_corpus(ours.prefix("text"), "x").dtype.type
    )
    for text in TEXTS:
        ids = list(text.encode()) + ([256] if text else [])
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in (".bin", ".idx"):
        assert Path(f"{ours.prefix('text')}{end}").read_bytes() == (tmp_path / f"theirs{end}").read_bytes()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=8))
def test_any_text_is_read_back(tmp_path: Path, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() or "x" for text in texts]
    done = job(write(tmp_path / "in.jsonl", texts), tmp_path / "out", append_eod=True)
    preprocess(done)
    assert documents(done.prefix("text")) == [[*text.encode(), 256] for text in texts]


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n\n\nthree")
    done = job(tmp_path / "in.txt", tmp_path / "out")
    preprocess(done)
    assert documents(done.prefix("text")) == [list(b"one\ntwo\n"), list(b"three")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "not JSON"),
        (b'{"other": "x"}', "the key 'text' is missing"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": 3}', "is not a text"),
        (b"[1]", "not a JSON object"),
    ],
)
def test_bad_lines_stop_or_are_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n' + line + b"\n" + b'{"text": "too"}\n')
    with pytest.raises(ConfigError, match=rf"in.jsonl:2: .*{reason}"):
        preprocess(job(source, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"], "something half-written was left"
    summary = preprocess(job(source, tmp_path / "out", skip_errors=True))
    assert (summary.documents, summary.skipped) == (2, 1) and reason in summary.errors[0]


def test_sentencepiece_end_to_end_and_another_tokenizer_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [f"words and numbers {i * i} again\n" for i in range(300)])
    models = [train_tokenizer(TokenizerJob([str(source)], str(tmp_path / f"t{size}"), size)) for size in (300, 310)]
    again = train_tokenizer(TokenizerJob([str(source)], str(tmp_path / "again"), 300))
    tokenizers = [build_tokenizer("SentencePieceTokenizer", TokenizerFiles(str(path))) for path in (*models, again)]
    text = "words  and 12\n\tunseen ünïcode 🙂"
    assert tokenizers[0].decode(tokenizers[0].encode(text)) == text
    assert tokenizers[0].encode(text) == tokenizers[2].encode(text), "training is not deterministic"
    done = Job([str(source)], ["text"], str(tmp_path / "out"), "SentencePieceTokenizer", TokenizerFiles(str(models[0])))
    preprocess(done)
    check_tokenizer(done.prefix("text"), tokenizers[0], "--data-path")
    with pytest.raises(ConfigError, match=r"--data-path .*vocabulary size 300.*310"):
        check_tokenizer(done.prefix("text"), tokenizers[1], "--data-path")


def test_tools_answer_in_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (["preprocess_data.py", "--input", "/nowhere"], "--input /nowhere"),
        (["train_tokenizer.py", "--input", "/nowhere"], "--input /nowhere"),
    ):
        extra = ["--tokenizer-type", "ByteTokenizer"] if "preprocess_data.py" in arguments else []
        command = [sys.executable, str(TOOLS / arguments[0]), *arguments[1:], *extra]
        command += ["--output-prefix", str(tmp_path / "out")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert message in result.stderr and "Traceback" not in result.stderr
