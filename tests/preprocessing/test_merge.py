"""Merging: bytes identical to a single job's, atomic output, validation of the inputs, and sizes beyond 32 bits."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_slm.corpus.checks import corpus_info
from megatron_slm.corpus.index import HEADER
from megatron_slm.corpus.loss_masks import LossMask, check_mask, write_mask
from megatron_slm.preprocessing.merge import Merged, merge_corpora, write_merged_index
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.preprocessing.shard_names import find_shards
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.corpus_files import Documents, build, run_tool, synthetic
from megatron_slm.tokenizers.tokenizer import TokenizerFiles


def same_files(ours: Path, theirs: Path) -> None:
    for end in (".bin", ".idx"):
        assert Path(f"{ours}{end}").read_bytes() == Path(f"{theirs}{end}").read_bytes(), end


sequences = st.lists(st.integers(0, 65535), min_size=1, max_size=5)
corpus = st.lists(st.lists(sequences, max_size=3), max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(corpus, min_size=1, max_size=4))
def test_merged_bytes_match_a_single_builder(tmp_path: Path, shards: list[Documents]) -> None:
    prefixes = [build(tmp_path / f"shard{number}", shard) for number, shard in enumerate(shards)]
    everything = list(itertools.chain.from_iterable(shards))
    build(tmp_path / "whole", everything)
    merged = merge_corpora(prefixes, str(tmp_path / "merged"))
    same_files(tmp_path / "merged", tmp_path / "whole")
    tokens = sum(len(sequence) for document in everything for sequence in document)
    assert merged == Merged(len(shards), len(everything), tokens, tuple(prefixes))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8])
def test_merged_bytes_match_megatron_core_merge(tmp_path: Path, dtype: Any) -> None:
    shards = [[[[1, 2], [3]], [[4]]], [], [[[5]]], [[[6, 7, 8]], []]]
    prefixes = [build(tmp_path / f"shard{number}", shard, dtype) for number, shard in enumerate(shards)]
    builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=dtype)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{tmp_path}/theirs.idx")
    merge_corpora(prefixes, str(tmp_path / "ours"))
    same_files(tmp_path / "ours", tmp_path / "theirs")
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [row.tolist() for row in dataset] == [[1, 2], [3], [4], [5], [6, 7, 8]]
    assert dataset.document_indices.tolist() == [0, 2, 3, 4, 5, 5]


def test_merged_text_shards_match_a_single_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": f"document {number} " * (number % 5)}) for number in range(47)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))

    def run(source: Path, prefix: Path) -> str:
        job = Job([str(source)], ["text"], str(prefix), "ByteTokenizer", TokenizerFiles(), append_eod=True)
        preprocess(job)
        return job.prefix("text")

    whole = run(tmp_path / "all.jsonl", tmp_path / "whole")
    (tmp_path / "shards").mkdir()
    for number in range(12):
        part = tmp_path / f"part{number}.jsonl"
        part.write_text("\n".join(lines[number * 4 : (number + 1) * 4]))
        run(part, tmp_path / "shards" / f"raw_shard{number}-of-12")
    output = tmp_path / "shards" / "raw_text_document"  # in the directory of its shards, and merged twice
    words = ["--input", str(tmp_path / "shards"), "--output-prefix", str(output)]
    for _ in range(2):
        code, shown, errors = run_tool(monkeypatch, capsys, "merge_datasets", words)
        assert code == 0 and "47 documents" in shown, errors
        same_files(output, Path(whole))
    merged, one = (json.loads(Path(f"{prefix}.corpus.json").read_text()) for prefix in (output, whole))
    del one["job"]  # by which --resume knows that a job is done; a merged corpus is of several
    assert merged == one


def test_metadata_counts_are_summed(tmp_path: Path) -> None:
    prefixes = [build(tmp_path / f"s{n}", [[[1, 2]]] * (n + 1), tokenizer="aa") for n in range(3)]
    merge_corpora(prefixes, str(tmp_path / "out"))
    record = json.loads((tmp_path / "out.corpus.json").read_text())
    assert record == {
        "tokenizer": {"name": "SentencePieceTokenizer", "fingerprint": "aa", "vocab_size": 100},
        "documents": 6,
        "tokens": 12,
        "skipped": 3,
        "append_eod": True,
    }
    without = build(tmp_path / "without", [[[1]]])
    assert merge_corpora([*prefixes, without], str(tmp_path / "out")).unrecorded == (without,)
    assert not (tmp_path / "out.corpus.json").exists(), "the record of the corpus that stood here before"


def test_loss_masks_are_merged(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    prefixes = [build(tmp_path / name, [[[1] * length]]) for name, length in (("a", 13), ("a.b", 7), ("c", 9))]
    bits = [rng.random(length) < 0.5 for length in (13, 7, 9)]
    for prefix, mask in zip(prefixes, bits, strict=True):
        write_mask(prefix, "answers", [mask], {})
        write_mask(prefix, "best", [~mask], {})
    merge_corpora(prefixes, str(tmp_path / "out"))
    check_mask(str(tmp_path / "out"), "best")
    assert (LossMask(str(tmp_path / "out"), "answers").get(0, 29) == np.concatenate(bits)).all()


def test_shards_are_sorted_by_number(tmp_path: Path) -> None:
    for number in (10, 9, 1, 100):
        build(tmp_path / f"part_{number}_text_document", [])
    found = [Path(name).name for name in find_shards(str(tmp_path), str(tmp_path / "out"))]
    assert found == [f"part_{number}_text_document" for number in (1, 9, 10, 100)]


def test_sizes_past_32_bits(tmp_path: Path) -> None:
    """A document longer than 2^31 bytes, and more than 2^31 tokens in one shard and over shards."""
    long = 2**31 - 1  # the most tokens that a length can hold: 8.6 GB of int32 in one document
    prefixes = [
        synthetic(tmp_path / "a", [5, long, 7], [0, 1, 2, 3], np.int32),
        synthetic(tmp_path / "b", [long, long, 3], [0, 2, 3], np.int32),
    ]
    infos = [corpus_info(prefix) for prefix in prefixes]
    assert [info.tokens for info in infos] == [long + 12, 2 * long + 3]
    write_merged_index(infos, tmp_path / "out.idx")
    os.truncate(tmp_path / "b.bin", 0)
    with (tmp_path / "out.bin").open("wb") as file:
        file.truncate(4 * (3 * long + 15))
        file.seek(4 * (3 * long + 12))
        file.write(np.array([11, 12, 13], np.int32).tobytes())
    dataset = IndexedDataset(str(tmp_path / "out"))
    begins = [0, 5, long + 5, long + 12, 2 * long + 12, 3 * long + 12]
    assert dataset.index.sequence_pointers.tolist() == [4 * begin for begin in begins]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 5, 6]
    assert dataset[5].tolist() == [11, 12, 13]
    assert corpus_info(str(tmp_path / "out")).tokens == 3 * long + 15


def test_file_system_without_range_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    prefixes = [build(tmp_path / name, [[[1, 2, 3]]]) for name in "ab"]
    merge_corpora(prefixes, str(tmp_path / "out"))
    assert [row.tolist() for row in IndexedDataset(str(tmp_path / "out"))] == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize("fails", ["copy_file_range", "fsync", "replace"])
def test_full_disk_keeps_the_existing_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    prefixes = [build(tmp_path / name, [[[1, 2, 3]]], tokenizer="aa") for name in "ab"]
    build(tmp_path / "out", [[[9]]], tokenizer="bb")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(ConfigError, match=r"--output-prefix .*cannot be written: No space left on device. Free space"):
        merge_corpora(prefixes, str(tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_concurrent_merges_are_rejected(tmp_path: Path) -> None:
    prefixes = [build(tmp_path / name, [[[1, 2, 3]]]) for name in "ab"]
    partial = tmp_path / "out.partial.bin"
    hold = f"import fcntl, sys; f = open({str(partial)!r}, 'w+b'); f.write(b'theirs'); f.flush()"
    hold += "; fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process is writing there"):
            merge_corpora(prefixes, str(tmp_path / "out"))
        assert partial.read_bytes() == b"theirs"
        holder.communicate(b"")
    merge_corpora(prefixes, str(tmp_path / "out"))  # leftover files are overwritten
    assert len(IndexedDataset(str(tmp_path / "out"))) == 2 and not partial.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def odd_offsets(directory: Path) -> None:
    content = bytearray((directory / "b.idx").read_bytes())
    content[HEADER.size + 2 * 4 + 8] ^= 1  # the second offset
    (directory / "b.idx").write_bytes(content)


def other_tokenizer(directory: Path) -> None:
    build(directory / "b", [[[4, 5]]], tokenizer="bb22")


OURS = "was not written by megatron_slm"


def change_metadata(directory: Path, name: str, **changes: Any) -> None:
    """Change fields of the metadata of a corpus, or of its tokenizer's identity; None removes one."""
    path = directory / f"{name}.corpus.json"
    metadata = json.loads(path.read_text())
    for field, value in changes.items():
        place = metadata["tokenizer"] if field in ("eod", "vocab_size") else metadata
        place[field] = value
        if value is None:
            del place[field]
    path.write_text(json.dumps(metadata))


def test_merging_metadata_of_an_earlier_release(tmp_path: Path) -> None:
    prefixes = [build(tmp_path / name, [[[1, 2, 3]]], tokenizer="aa") for name in "abc"]
    change_metadata(tmp_path, "a", append_eod=None)
    change_metadata(tmp_path, "b", eod=2)
    merge_corpora(prefixes, str(tmp_path / "out"))
    metadata = json.loads((tmp_path / "out.corpus.json").read_text())
    assert metadata["tokenizer"]["eod"] == 2 and metadata["documents"] == 3 and "append_eod" not in metadata


BAD: list[tuple[str, Callable[[Path], Any], list[str], str]] = [
    ("no directory", lambda f: None, ["--input", "nowhere"], "--input {}/nowhere: no such directory"),
    ("empty directory", lambda f: (f / "e").mkdir(), ["--input", "e"], "the directory contains no corpus"),
    ("no such shard", lambda f: None, ["--input-prefixes", "a", "x"], "x.bin is missing"),
    ("suffix given", lambda f: None, ["--input-prefixes", "a.bin"], "Omit .bin from the prefix"),
    ("no index", lambda f: (f / "b.idx").unlink(), ["--input", "."], "b.idx is missing"),
    ("no tokens", lambda f: (f / "b.bin").unlink(), ["--input", "."], "b.bin is missing"),
    ("tokens cut", lambda f: cut(f / "b.bin"), ["--input", "."], "its index requires"),
    ("index cut", lambda f: cut(f / "b.idx"), ["--input", "."], "its header requires"),
    ("foreign", lambda f: (f / "b.idx").write_bytes(b"PK" * 50), ["--input", "."], "is not a Megatron-Core index"),
    ("odd offsets", odd_offsets, ["--input", "."], "are not the sums of its lengths"),
    ("dtypes", lambda f: build(f / "b", [[[1]]], np.int32), ["--input", "."], "dtype int32, but {}/a has uint16"),
    ("tokenizers", other_tokenizer, ["--input", "."], "fingerprint bb22, but {}/a with"),
    (
        "ends",
        lambda f: [change_metadata(f, "a", eod=1), change_metadata(f, "b", eod=2)],
        ["--input", "."],
        "b was made with SentencePieceTokenizer of end-of-document id 2, but {}/a with SentencePieceTokenizer of",
    ),
    (
        "no ends",
        lambda f: change_metadata(f, "a", append_eod=False),
        ["--input", "."],
        "b was made with --append-eod, but {}/a without",
    ),
    ("twice", lambda f: None, ["--input-prefixes", "a", "b", "./a"], "a is named twice"),
    ("output is input", lambda f: None, ["--input-prefixes", "a", "out"], "out is one of the inputs"),
    ("output in directory", lambda f: build(f / "out", []), ["--input", "."], "out is one of the inputs"),
    ("being written", lambda f: build(f / "c.partial", []), ["--input", "."], "c.partial is being written"),
    ("gap", lambda f: [build(f / f"s{n}-of-4", []) for n in (0, 1, 3)] and strip(f), ["--input", "."], "# = 2"),
    ("end missing", lambda f: [build(f / f"s{n}-of-3", []) for n in (1, 2)] and strip(f), ["--input", "."], "# = 0"),
    ("two jobs", lambda f: [build(f / f"{n}0-of-1", []) for n in "st"] and strip(f), ["--input", "."], "2 corpora"),
    ("stranger", lambda f: [build(f / "s0-of-1", [])], ["--input", "."], "contains numbered shards, but"),
    ("no output", lambda f: None, ["--input", ".", "--output-prefix", "a.bin/out"], "a.bin/out.idx cannot be written"),
    (
        "foreign .bin",
        lambda f: (f / "m.bin").write_bytes(b"PK" * 9),
        ["--input-prefixes", "a", "--output-prefix", "m"],
        OURS,
    ),
    (
        "foreign .idx",
        lambda f: (f / "m.idx").write_bytes(b"PK" * 9),
        ["--input-prefixes", "a", "--output-prefix", "m"],
        OURS,
    ),
    (
        "device",
        lambda f: (f / "m.bin").symlink_to("/dev/null"),
        ["--input-prefixes", "a", "--output-prefix", "m"],
        "m.bin is a device",
    ),
    (
        "stopped job",
        lambda f: (f / "m.journal").write_text("x"),
        ["--input-prefixes", "a", "--output-prefix", "m"],
        "a preprocessing job is writing there, or was killed",
    ),
    ("no device", lambda f: None, ["--input", ".", "--output-prefix", "/proc/x/out"], "/proc/x/out cannot be written"),
    (
        "mask",
        lambda f: write_mask(str(f / "b"), "m", [np.ones(3, bool)], {}),
        ["--input", "."],
        "b has the loss mask m, but",
    ),
    ("no input", lambda f: None, [], "one of the arguments --input --input-prefixes is required"),
    ("both inputs", lambda f: None, ["--input", ".", "--input-prefixes", "a"], "not allowed with argument --input"),
]


def strip(directory: Path) -> None:
    for name in ("a", "b"):
        for path in directory.glob(f"{name}.*"):
            path.unlink()


@pytest.mark.parametrize(("damage", "words", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    words: list[str],
    message: str,
) -> None:
    for name in "ab":
        build(tmp_path / name, [[[1, 2]], [[3]]], tokenizer="aa11")
    damage(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = [word if word.startswith(("-", "/")) else str(tmp_path / word) for word in words]
    if "--output-prefix" not in words:
        words += ["--output-prefix", str(tmp_path / "out")]
    code, _, errors = run_tool(monkeypatch, capsys, "merge_datasets", words)
    assert code == 2
    assert message.format(tmp_path) in errors, errors
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
