"""Preprocessing: corpora identical to those of Megatron-Core's builder, for every input format and tokenizer."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from test_documents import lines, write_table

from megatron_slm.corpus.checks import check_corpus, check_tokenizer
from megatron_slm.preprocessing import documents as blocks
from megatron_slm.preprocessing import preprocess as module
from megatron_slm.preprocessing.engines import Engine
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.preprocessing.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_slm.preprocessing.workers import AHEAD, worker_processes
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer

TEXTS = ["one two three", "naïve ▁ 日本語 🙂\n\tx", "", "a" * 500, "  spaces   kept "]
TOOLS = Path(__file__).parents[2] / "tools"


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
def test_bytes_match_megatron_core_builder(tmp_path: Path, suffix: str, workers: int) -> None:
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
def test_any_text_round_trips(tmp_path: Path, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() or "x" for text in texts]
    done = job(write(tmp_path / "in.jsonl", texts), tmp_path / "out", append_eod=True)
    preprocess(done)
    assert documents(done.prefix("text")) == [[*text.encode(), 256] for text in texts]


def test_plain_text_is_split_at_blank_lines(tmp_path: Path) -> None:
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
        (b'{"text": 3}', "is not a string"),
        (b"[1]", "not a JSON object"),
    ],
)
def test_unreadable_lines_stop_or_are_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n' + line + b"\n" + b'{"text": "too"}\n')
    with pytest.raises(ConfigError, match=rf"in.jsonl:2: .*{reason}"):
        preprocess(job(source, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"], "something half-written was left"
    summary = preprocess(job(source, tmp_path / "out", skip_errors=True))
    assert (summary.documents, summary.skipped) == (2, 1) and reason in summary.errors[0]


def test_sentencepiece_end_to_end_and_rejection_of_another_tokenizer(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [f"words and numbers {i * i} again\n" for i in range(300)])
    models = [
        train_tokenizer(TokenizerJob([str(source)], str(tmp_path / f"t{size}"), size)).path for size in (300, 310)
    ]
    again = train_tokenizer(TokenizerJob([str(source)], str(tmp_path / "again"), 300)).path
    tokenizers = [build_tokenizer("SentencePieceTokenizer", TokenizerFiles(str(path))) for path in (*models, again)]
    text = "words  and 12\n\tunseen ünïcode 🙂"
    assert tokenizers[0].decode(tokenizers[0].encode(text)) == text
    assert tokenizers[0].encode(text) == tokenizers[2].encode(text), "training is not deterministic"
    done = Job([str(source)], ["text"], str(tmp_path / "out"), "SentencePieceTokenizer", TokenizerFiles(str(models[0])))
    preprocess(done)
    check_tokenizer(done.prefix("text"), tokenizers[0], "--data-path")
    with pytest.raises(ConfigError, match=r"--data-path .*vocabulary size 300.*310"):
        check_tokenizer(done.prefix("text"), tokenizers[1], "--data-path")


Sequences = list[list[int]]


def megatrons(values: list[Any], split: Callable[[str], list[str]] | None, append_eod: bool) -> list[Sequences]:
    """Return the sequences of each document by a simple definition of Megatron-LM's tool, for ByteTokenizer."""
    made = []
    for value in values:
        texts = value if isinstance(value, list) else [value]
        if split is not None:
            texts = split(value)
        sequences = [list(text.encode()) for text in texts if text.encode()]
        if sequences and append_eod:
            sequences[-1].append(256)
        made.append(sequences)
    return made


def built(documents: list[Sequences], prefix: Path) -> list[bytes]:
    """Return the bytes that Megatron-Core's builder writes."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for sequences in documents:
        ids = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.tensor(ids, dtype=torch.int64), list(map(len, sequences)))
    builder.finalize(f"{prefix}.idx")
    return [Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")]


def written(done: Job, key: str = "text") -> list[bytes]:
    return [Path(f"{done.prefix(key)}{end}").read_bytes() for end in (".bin", ".idx")]


def sentences(text: str) -> list[str]:
    return text.split(".")


VALUES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    pairs=st.lists(st.tuples(VALUES | st.lists(VALUES, max_size=3), VALUES), min_size=1, max_size=12),
    append_eod=st.booleans(),
    block=st.integers(1, 200),
)
def test_documents_match_megatron_lm(
    tmp_path: Path, pairs: list[tuple[Any, str]], append_eod: bool, block: int
) -> None:
    """Two keys, empty texts and lists of texts, for every block size."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": a, "title": b}) + "\n" for a, b in pairs), encoding="utf-8")
    done = replace(job(source, tmp_path / "out", append_eod=append_eod), keys=["title", "text"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        summary = preprocess(done)
    assert written(done) == built(megatrons([a for a, _ in pairs], None, append_eod), tmp_path / "text")
    assert written(done, "title") == built(megatrons([b for _, b in pairs], None, append_eod), tmp_path / "title")
    assert summary.documents == len(pairs)


def test_split_sentences_match_megatron_lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_splitter", lambda job: sentences)
    texts = ["One. Two..three", "", ".", "no end"]
    done = job(write(tmp_path / "in.jsonl", texts), tmp_path / "out", append_eod=True, split_sentences=True)
    preprocess(done)
    assert done.prefix("text").endswith("out_text_sentence")
    assert written(done) == built(megatrons(texts, sentences, True), tmp_path / "theirs")


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_documents(tmp_path: Path, count: int) -> None:
    done = job(write(tmp_path / "in.jsonl", ["a", "bc"][:count]), tmp_path / "out")
    assert preprocess(done).documents == count
    assert documents(done.prefix("text")) == [[97], [98, 99]][:count]


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow", "in.feather", "in.txt", "memory", "-", "in.jsonl.bz2"])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_input_format_gives_the_same_bytes(
    tmp_path: Path, name: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 500)
    texts = [f"{number} 日本語 text " * (number % 5 + 1) + "\n" for number in range(100)]
    expected = job(write(tmp_path / "expected.jsonl", texts), tmp_path / "expected")
    preprocess(expected)
    source = str(tmp_path / name)
    if name == "memory":
        source = "memory://preprocess/in.jsonl"
        fsspec.filesystem("memory").pipe("/preprocess/in.jsonl", lines(texts))
    elif name == "-":
        source = "-"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines(texts))))
    elif name == "in.txt":
        Path(source).write_text("\n".join(texts), encoding="utf-8")
    elif name.endswith("bz2"):
        Path(source).write_bytes(bz2.compress(lines(texts)))
    else:
        write_table(Path(source), list(texts))
    done = replace(job(tmp_path, tmp_path / "out", workers=workers), files=[source])
    preprocess(done)
    assert written(done) == written(expected)


def test_text_file_as_one_document(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"{name}\n\nmore\n")
    done = job(tmp_path, tmp_path / "out", text_document="file")
    preprocess(replace(done, files=[str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]))
    assert documents(done.prefix("text")) == [list(b"one.txt\n\nmore\n"), list(b"two.txt\n\nmore\n")]


class StandIn:
    """An engine that gives a character for an id, unless ``action`` ends it at the text "bad"."""

    name = "stand-in"

    def __init__(self, dtype: np.dtype, action: Callable[[], object] = lambda: None) -> None:
        self.dtype, self.action = dtype, action

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        if "bad" in texts.to_pylist():
            self.action()
        _, offsets, data = texts.slice(0).buffers()
        lengths = np.diff(np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1])
        return np.frombuffer(data, np.uint8).astype(self.dtype), lengths


def test_document_of_30_mb(tmp_path: Path) -> None:
    """All bytes are processed; only the tokenizer is replaced by a fast stub."""
    text = "x" * 30_000_000
    (tmp_path / "in.jsonl").write_bytes(lines(["before", text, "after"]))
    done = job(tmp_path / "in.jsonl", tmp_path / "out", workers=2, append_eod=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_engine", lambda tokenizer, dtype, _: (StandIn(dtype), ""))
        assert preprocess(done).documents == 3
    assert check_corpus(done.prefix("text"), "x").tokens == 30_000_000 + 11 + 3


def merge(directory: Path, prefix: Path) -> list[bytes]:
    """Merge the corpora of a directory in name order with Megatron-Core."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for path in sorted(directory.glob("*.idx")):
        builder.add_index(str(path.with_suffix("")))
    builder.finalize(f"{prefix}.idx")
    return [Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")]


def test_merged_shards_match_a_single_job(tmp_path: Path) -> None:
    """By the Slurm script, with a plain, a compressed and a table file."""
    texts = [f"text {number} " * (number % 4 + 1) for number in range(40)]
    write(tmp_path / "a.jsonl", texts)
    write(tmp_path / "b.jsonl.gz", texts)
    write_table(tmp_path / "c.parquet", list(texts), rows=7)
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    whole = replace(job(tmp_path, tmp_path / "whole", append_eod=True), files=files)
    preprocess(whole)
    script = TOOLS.parent / "examples" / "slurm" / "preprocess_array.sbatch"
    command = ["bash", str(script), "--input", *files, "--output-prefix", str(tmp_path / "out"), "--append-eod"]
    for number in range(2):
        slurm = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "2"}
        slurm |= {"SLURM_SUBMIT_DIR": str(TOOLS.parent), "PYTHON": sys.executable}
        subprocess.run([*command, "--tokenizer-type", "ByteTokenizer"], env=os.environ | slurm, check=True)
    directory = tmp_path / "out_text_document"
    assert sorted(path.stem for path in directory.glob("*.bin")) == [f"{number:05d}-of-00002" for number in range(2)]
    assert merge(directory, tmp_path / "merged") == written(whole)


def test_small_input_leaves_empty_shards(tmp_path: Path) -> None:
    whole = job(write(tmp_path / "in.jsonl", ["one", "a longer text " * 9, "three"]), tmp_path / "whole")
    preprocess(whole)
    for number in range(6):
        preprocess(replace(whole, output_prefix=str(tmp_path / "many"), shard=(number, 6)))
    sizes = [path.stat().st_size for path in (tmp_path / "many_text_document").glob("*.bin")]
    assert len(sizes) == 6 and sizes.count(0) >= 3
    assert merge(tmp_path / "many_text_document", tmp_path / "merged") == written(whole)


def test_shard_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(["good"] * 50) + b"bad\n" + lines(["good"] * 20))
    errors = [
        error
        for number in range(4)
        for error in preprocess(job(source, tmp_path / "out", skip_errors=True, shard=(number, 4))).errors
    ]
    assert len(errors) == 1 and "in.jsonl:51: not JSON" in errors[0]


def test_number_of_items_in_flight_is_bounded() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    with worker_processes(2, str) as work:
        for done, (number, result) in enumerate(work(items())):
            assert (number, result) == (done, str(done))
            assert taken <= done + AHEAD * 2
            time.sleep(0.001)  # the workers are quicker than the one who takes


def test_worker_errors_stop_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(action: Callable[[], object]) -> Callable[..., tuple[Engine, str]]:
        return lambda tokenizer, dtype, _: (StandIn(dtype, action), "")

    def differs() -> None:
        raise ConfigError("gigatoken differs")

    source = write(tmp_path / "in.jsonl", ["good"] * 50 + ["bad"] + ["good"] * 50)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    for action, message in (
        (differs, "gigatoken differs"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "--workers: a worker process was killed"),
    ):
        monkeypatch.setattr(module, "build_engine", broken(action))
        with pytest.raises(ConfigError, match=message):
            preprocess(job(source, tmp_path / "out", workers=2, skip_errors=True))
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"], "something half-written was left"


def test_summary_counts(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines(["four", "", "日本"]) + b"\n \nbad\n")
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), "--input", str(tmp_path / "in.jsonl")]
    command += ["--tokenizer-type", "ByteTokenizer", "--output-prefix", str(tmp_path / "out"), "--on-error", "skip"]
    command += ["--append-eod", "--log-interval", "2", "--workers", "2", "--partitions", "2"]
    result = subprocess.run([*command, "--keep-sequential-samples"], capture_output=True, text=True, check=True)
    assert "3 documents, 12 tokens, 0.83 bytes per token, 1 skipped" in result.stdout
    assert "1 without a token, 2 blank lines" in result.stdout
    assert f"skipped {tmp_path}/in.jsonl:6: not JSON" in result.stderr and "3 documents, " in result.stderr
    record = json.loads((tmp_path / "out_text_document.corpus.json").read_text())
    assert record["documents"] == 3 and record["tokens"] == 12 and record["tokenizer"]["name"] == "ByteTokenizer"


def test_tools_report_errors_in_one_line(tmp_path: Path) -> None:
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
