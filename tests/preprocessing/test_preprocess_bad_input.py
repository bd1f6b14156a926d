"""Invalid flags, files and lines: exit code 2, a message with location and remedy, and no leftover files."""

from __future__ import annotations

import gzip
import lzma
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from nltk.downloader import Downloader
from test_documents import lines, write_table

from megatron_slm.cli import preprocess_data

GOOD = lines(["good", "too"])
BYTES = ["--tokenizer-type", "ByteTokenizer"]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Good and bad inputs; the test runs in this directory."""
    monkeypatch.chdir(tmp_path)
    files = {
        "good.jsonl": GOOD,
        "not_json.jsonl": GOOD + b"{not json\n" + GOOD,
        "extra.jsonl": GOOD + b'{"text": "a"} {"text": "b"}\n',
        "no_key.jsonl": b'{"content": "x"}\n' + GOOD,
        "not_utf8.jsonl": GOOD + b'{"text": "\xff\xfe"}',
        "number.jsonl": GOOD + b'{"text": 3}\n',
        "null.jsonl": GOOD + b'{"text": null}\n',
        "list.jsonl": GOOD + b'{"text": ["a", 3]}\n',
        "array.jsonl": GOOD + b"[1]\n",
        "surrogate.jsonl": GOOD + b'{"text": "\\ud800"}\n',
        "deep.jsonl": GOOD + b"[" * 200_000 + b"\n",
        "utf16.jsonl": GOOD.decode().encode("utf-16"),
        "utf16be.jsonl": GOOD.decode().encode("utf-16-be"),
        "utf16.txt": "one".encode("utf-16"),
        "utf16.jsonl.gz": gzip.compress(GOOD.decode().encode("utf-16-le")),
        "utf32.jsonl": GOOD.decode().encode("utf-32"),
        "not_utf8.txt": b"one\n\ntwo \xff\n",
        "cut.jsonl.gz": gzip.compress(GOOD)[:-12],
        "cut.jsonl.xz": lzma.compress(GOOD)[:-12],
        "cut.jsonl.zst": zstandard.ZstdCompressor().compress(GOOD)[:-3],
        "false.jsonl.gz": GOOD,
        "false.jsonl.zst": GOOD,
        "false.parquet": GOOD,
        "false.arrow": GOOD,
        "empty.jsonl": b"",
        "blank.jsonl": b"\n \n\n",
        "in.zip": b"PK",
        "table.parquet.gz": b"",
        "table.csv": b"text\nhello\n",
        "table.csv.gz": gzip.compress(b"text\nhello\n"),
        "list.json": b'[{"text": "a"}, {"text": "b"}]',
        "indented.json": b'{\n  "text": "a"\n}\n',
        "indented_list.json": b'[\n  {\n    "text": "a"\n  }\n]\n',
        "unnamed_gzip": gzip.compress(GOOD),
        "unnamed_zstd.jsonl": zstandard.ZstdCompressor().compress(GOOD),
        "words.jsonl": lines(["1 2 x"]),
        "large.jsonl": lines(["70000"]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "sub").mkdir()
    write_table(tmp_path / "good.parquet", ["a", "b"])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-10])
    write_table(tmp_path / "null.parquet", ["a", None])
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    return tmp_path


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *arguments])
    return preprocess_data.main()


LINES = [  # name, place, reason
    ("not_json.jsonl", ":3", "not JSON"),
    ("extra.jsonl", ":3", "not JSON (Extra data"),
    ("no_key.jsonl", ":1", "the key 'text' is missing (--json-keys)"),
    ("not_utf8.jsonl", ":3", "not UTF-8"),
    ("number.jsonl", ":3", "the value of 'text' is not a string"),
    ("null.jsonl", ":3", "the value of 'text' is not a string"),
    ("list.jsonl", ":3", "the value of 'text' is not a string"),
    ("array.jsonl", ":3", "not a JSON object"),
    ("surrogate.jsonl", ":3", "a lone surrogate"),
    ("deep.jsonl", ":3", "nested too deeply"),
    *(
        (name, ":1", "the file is UTF-16 text, not UTF-8. Convert it: iconv -f UTF-16")
        for name in ("utf16.jsonl", "utf16be.jsonl", "utf16.txt", "utf16.jsonl.gz")
    ),
    ("utf32.jsonl", ":1", "the file is UTF-32 text"),
    ("not_utf8.txt", ":3", "not UTF-8"),
    ("cut.jsonl.gz", ":", "truncated within"),
    ("cut.jsonl.xz", ":", "truncated within"),
    ("cut.jsonl.zst", ":", "truncated within"),
    ("false.jsonl.gz", ":1", "invalid .gz data"),
    ("false.jsonl.zst", ":1", "invalid .zst data"),
    ("false.parquet", ", row 1", "truncated or of another format"),
    ("false.arrow", ", row 1", "truncated or of another format"),
    ("cut.parquet", ", row 1", "truncated or of another format"),
    ("null.parquet", ", row 2", "the value of 'text' is not a string"),
]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("name", "place", "reason"), LINES, ids=[name for name, _, _ in LINES])
def test_unreadable_input_stops_or_is_skipped(
    directory: Path,
    name: str,
    place: str,
    reason: str,
    workers: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(directory.iterdir())
    arguments = ["--input", "good.jsonl", name, "good.jsonl", *BYTES, "--output-prefix", "out", "--workers", workers]
    assert run(arguments, monkeypatch) == 2
    message = capsys.readouterr().err
    assert f"error: {name}{place}" in message and reason in message and "--on-error skip" in message
    assert "Traceback" not in message
    assert sorted(directory.iterdir()) == before, "something half-written was left"
    assert run([*arguments, "--on-error", "skip"], monkeypatch) == 0
    done = capsys.readouterr()
    assert f"skipped {name}{place}" in done.err and reason in done.err
    assert " 1 skipped" in done.out


BAD: list[tuple[str, list[str], list[str]]] = [
    ("no such file", ["--input", "nowhere.jsonl"], ["--input nowhere.jsonl", "no such file"]),
    ("no match", ["--input", "nowhere*.jsonl"], ["--input nowhere*.jsonl", "no such file"]),
    ("directory", ["--input", "sub"], ["--input sub is a directory", "'sub/*.jsonl'"]),
    ("archive", ["--input", "in.zip"], ["--input in.zip", "Unpack it"]),
    ("csv", ["--input", "table.csv"], ["--input table.csv: .csv files are not supported. Convert it to JSON lines"]),
    ("packed csv", ["--input", "table.csv.gz"], ["--input table.csv.gz: .csv files are not supported"]),
    ("list", ["--input", "list.json"], ["list.json:1: not a JSON object", "jq -c '.[]' FILE"]),
    ("indented", ["--input", "indented.json"], ["indented.json:1: not JSON", "jq -c . FILE"]),
    ("indented list", ["--input", "indented_list.json"], ["indented_list.json:1: not JSON", "jq -c '.[]' FILE"]),
    ("unnamed gzip", ["--input", "unnamed_gzip"], ["unnamed_gzip:1: the file is a .gz file by its content"]),
    ("unnamed zstd", ["--input", "unnamed_zstd.jsonl"], ["the file is a .zst file by its content. Rename it"]),
    ("packed table", ["--input", "table.parquet.gz"], ["table.parquet.gz", "Unpack it"]),
    ("empty", ["--input", "empty.jsonl"], ["--input: empty.jsonl contains no document"]),
    ("blank", ["--input", "blank.jsonl"], ["--input: blank.jsonl contains no document"]),
    (
        "all bad",
        ["--input", "array.jsonl", "--json-keys", "y", "--on-error", "skip"],
        ["contains no document that can be read", "array.jsonl:1", "the key 'y' is missing"],
    ),
    ("column", ["--input", "good.parquet", "--json-keys", "body"], ["--json-keys body", "number, text"]),
    ("column kind", ["--input", "numbers.parquet"], ["--json-keys text", "numbers.parquet has type int64"]),
    ("key twice", ["--json-keys", "text", "text"], ["--json-keys text text repeats a key"]),
    ("workers", ["--workers", "0"], ["--workers 0: must be at least 1"]),
    ("workers word", ["--workers", "many"], ["--workers", "many"]),
    ("keep newlines", ["--keep-newlines"], ["--keep-newlines", "--split-sentences"]),
    ("nltk data", ["--nltk-data", "sub"], ["--nltk-data", "--split-sentences"]),
    (
        "no punkt",
        ["--split-sentences", "--nltk-data", "sub", "--lang", "klingon"],
        ["--split-sentences", "klingon"],
    ),
    ("partitions", ["--partitions", "3", "--workers", "4"], ["--partitions 3 must divide --workers 4"]),
    ("partitions order", ["--partitions", "2", "--workers", "2"], ["--partitions 2", "--keep-sequential-samples"]),
    ("log interval", ["--log-interval", "0"], ["--log-interval is 0"]),
    ("shard", ["--shard", "3/3"], ["--shard 3/3: must be i/n", "0/8 ... 7/8"]),
    ("shard words", ["--shard", "first"], ["--shard first: must be i/n"]),
    ("stdin resume", ["--input", "-", "--resume"], ["--resume", "standard input"]),
    ("stdin shard", ["--input", "-", "--shard", "0/2"], ["--shard", "standard input"]),
    ("megatron's flag", ["--find-optimal-num-workers"], ["--find-optimal-num-workers", "benchmark_preprocess.py"]),
    ("megatron's value", ["--vocab-extra-ids=3"], ["--vocab-extra-ids is not supported. Add the tokens"]),
    ("unknown flag", ["--append-eos"], ["unknown flag --append-eos", "Did you mean --append-eod?"]),
    ("abbreviation", ["--append"], ["unknown flag --append"]),
    ("stray word", ["--append-eod", "yes"], ["unexpected positional argument 'yes'"]),
    ("tokenizer", ["--tokenizer-type", "Bert"], ["--tokenizer-type must be one of", "not 'Bert'"]),
    ("tokenizer file", ["--tokenizer-type", "SentencePieceTokenizer"], ["--tokenizer-model"]),
    (
        "no words",
        ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--input", "words.jsonl"],
        ["words.jsonl:1: 'x' is not a token id"],
    ),
    (
        "id too large",
        ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--input", "large.jsonl"],
        ["large.jsonl:1", "the id 70000 is outside the vocabulary of 9"],
    ),
    ("empty prefix", ["--output-prefix", ""], ["--output-prefix is empty"]),
    ("directory prefix", ["--output-prefix", "sub/"], ["--output-prefix sub/ names a directory"]),
    ("existing prefix", ["--output-prefix", "sub"], ["--output-prefix sub is an existing directory"]),
    ("dots", ["--output-prefix", "sub/.."], ["--output-prefix sub/.. names a directory"]),
    (
        "output",
        ["--output-prefix", "good.jsonl/out"],
        ["--output-prefix good.jsonl/out_text_document.idx cannot be written"],
    ),
    ("package", ["--input", "s3://bucket/in.jsonl"], ["--input s3://bucket/in.jsonl", "pip install s3fs"]),
    ("protocol", ["--input", "nonsense://in.jsonl"], ["does not support the protocol nonsense://"]),
]


def offline(*given: object, **named: object) -> None:
    raise OSError("no connection")


@pytest.mark.parametrize("end", [".partial.bin", ".partial.lengths", ".partial.sequences", ".partial.idx", ".journal"])
def test_temporary_names_that_are_taken(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    taken = directory / f"out_text_document{end}"
    words = ["--input", "good.jsonl", "--tokenizer-type", "ByteTokenizer", "--output-prefix", "out"]
    taken.mkdir()
    for kind in ("a directory", "a named pipe"):
        before = sorted(directory.iterdir())
        assert run(words, monkeypatch) == 2
        assert f"{taken.name} is {kind}, which is not replaced" in capsys.readouterr().err
        assert sorted(directory.iterdir()) == before
        if kind == "a directory":
            taken.rmdir()
            os.mkfifo(taken)


@pytest.mark.parametrize(("arguments", "messages"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_invalid_flags_and_files_are_named(
    directory: Path,
    arguments: list[str],
    messages: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(Downloader, "download", offline)
    defaults = {"--input": ["good.jsonl"], "--tokenizer-type": ["ByteTokenizer"], "--output-prefix": ["out"]}
    rest = [word for flag, value in defaults.items() if flag not in arguments for word in (flag, *value)]
    before = sorted(directory.iterdir())
    assert run([*rest, *arguments], monkeypatch) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    for message_part in messages:
        assert message_part in message
    assert sorted(directory.iterdir()) == before, "something half-written was left"
