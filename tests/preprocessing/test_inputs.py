"""Input files: names, encodings and column types that give the same documents, and error messages."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_documents import PACK, read

from megatron_slm.cli import preprocess_data
from megatron_slm.config.flags import parse
from megatron_slm.config.paths import PATH_SETTINGS
from megatron_slm.config.recipe import settings
from megatron_slm.preprocessing.documents import find_inputs
from megatron_slm.preprocessing.inputs import BYTE_ORDER_MARK
from megatron_slm.preprocessing.preprocess import preprocess
from megatron_slm.preprocessing.shards import split_inputs
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.corpus_files import run_tool

MARK = BYTE_ORDER_MARK
LINES = b'{"text": "one"}\n{"text": "two"}\n'


def corpus(directory: Path, *flags: str) -> tuple[bytes, bytes]:
    """The bytes of ids and of the index that preprocess_data.py makes."""
    arguments = [*flags, "--output-prefix", str(directory / "out"), "--tokenizer-type", "ByteTokenizer", "--append-eod"]
    job = preprocess_data.make_job(preprocess_data.parse_arguments(arguments))
    preprocess(job)
    return tuple(Path(f"{job.prefix(job.keys[0])}.{suffix}").read_bytes() for suffix in ("bin", "idx"))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "in.jsonl.gz", "in.jsonl.zst", "in.txt.xz", "in.JSONL.BZ2"])
@pytest.mark.parametrize("location", ["path", "url", "stdin", "shards"])
def test_byte_order_mark_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, location: str) -> None:
    content = b"one\n\ntwo\n" if "txt" in name else LINES
    suffix = Path(name).suffix.lower()
    pack = PACK.get(suffix, bytes)
    path = tmp_path / name
    path.write_bytes(pack(MARK + content))
    if location == "path":
        found = read([str(path)])
    elif location == "url":
        fsspec.filesystem("memory").pipe(f"/marks/{name}", path.read_bytes())
        found = read([f"memory://marks/{name}"])
    elif location == "stdin":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MARK + LINES)))
        found = read(["-"])
    else:
        parts = [part for number in range(2) for part in split_inputs([str(path)], "paragraph", (number, 2))]
        assert parts
        monkeypatch.chdir(tmp_path)
        with_mark = corpus(tmp_path, "--input", str(path), "--text-document", "file")
        path.write_bytes(pack(content))
        assert with_mark == corpus(tmp_path, "--input", str(path), "--text-document", "file")
        return
    assert [text.strip() for _, text in found] == ["one", "two"]


def test_byte_order_marks_of_concatenated_files(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes((MARK + LINES) * 2)
    assert [text for _, text in read([str(tmp_path / "in.jsonl")])] == ["one", "two"] * 2


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *(
            ("in.JSONL", ""),
            ("in.TXT", ""),
            ("in.jsonl.GZ", ".gz"),
            ("IN.JSONL.ZST", ".zst"),
            ("in.jsonl.zstd", ".zst"),
        ),
        *(("in.Txt.Bz2", ".bz2"), ("in.ndjson.XZ", ".xz")),
    ],
)
def test_suffixes_are_case_insensitive(tmp_path: Path, name: str, packed: str) -> None:
    content = b"one\n\ntwo\n" if "txt" in name.lower() else LINES
    (tmp_path / name).write_bytes(PACK[packed](content))
    assert [text.strip() for _, text in read([str(tmp_path / name)])] == ["one", "two"]


@pytest.mark.parametrize("name", ["in.ZIP", "in.parquet.GZ", "in.PQ.gz"])
def test_rejected_suffixes_are_case_insensitive(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"[Uu]npack it"):
        find_inputs([str(tmp_path / name)])


TEXTS = ["one", "é🙂", "two"]
COLUMNS: dict[str, Any] = {
    "string": pa.array(TEXTS, pa.string()),
    "large string": pa.array(TEXTS, pa.large_string()),
    "string view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array([text.encode() for text in TEXTS], pa.binary()),
    "large binary": pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of binary": pa.array([text.encode() for text in TEXTS]).dictionary_encode(),
}
NESTED = pa.array([{"text": text, "id": place, "deep": {"text": text}} for place, text in enumerate(TEXTS)])


def write(path: Path, table: pa.Table) -> str:
    if path.suffix.lower() in (".parquet", ".pq"):
        pq.write_table(table, path, row_group_size=2)
    else:
        with path.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


@pytest.mark.parametrize("name", ["in.parquet", "in.pq", "in.PARQUET", "in.arrow"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_text_columns_of_every_type(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path / name, pa.table({"n": [1, 2, 3], "text": COLUMNS[kind]}))
    assert [text for _, text in read([path])] == TEXTS


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow"])
@pytest.mark.parametrize("make", [pa.list_, pa.large_list, pa.list_view, lambda inner: pa.list_(inner, 1)])
def test_lists_of_texts_of_every_type(tmp_path: Path, name: str, make: Any) -> None:
    lists = pa.array([[text] for text in TEXTS], make(pa.string()))
    assert [text for _, text in read([write(tmp_path / name, pa.table({"text": lists}))])] == [[t] for t in TEXTS]


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow", "in.jsonl"])
@pytest.mark.parametrize("key", ["meta.text", "meta.deep.text", "meta.with.dots"])
def test_nested_fields(tmp_path: Path, name: str, key: str) -> None:
    table = pa.table({"n": [1, 2, 3], "meta": NESTED, "meta.with.dots": TEXTS})
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        write(path, table)
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({key: text}) + "\n" for text in TEXTS))
    flags = ["--json-keys", key]
    assert corpus(tmp_path, "--input", str(path), *flags) == corpus(tmp_path, "--input", str(plain), *flags)


def test_plain_and_nested_key(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", pa.table({"title": TEXTS, "meta": NESTED}))
    ids, _ = corpus(tmp_path, "--input", path, "--json-keys", "meta.text", "title")
    assert ids == (tmp_path / "out_title_document.bin").read_bytes()
    assert np.frombuffer(ids, np.uint16)[:4].tolist() == [*b"one", 256]


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ({"meta": NESTED}, "meta", "--json-keys meta: the column of .* has type struct"),
        ({"meta": NESTED}, "meta.body", r"no such column; its columns are meta\.text, meta\.id, meta\.deep"),
        ({"meta": NESTED}, "meta.id", "has type int64, but must be string or binary"),
        ({"text": TEXTS}, "text.more", r"no such column; its columns are text\."),
    ],
)
def test_bad_columns(tmp_path: Path, table: dict[str, Any], key: str, message: str) -> None:
    path = write(tmp_path / "in.parquet", pa.table(table))
    with pytest.raises(ConfigError, match=message):
        corpus(tmp_path, "--input", path, "--json-keys", key)


def test_invalid_utf8_names_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", pa.table({"text": pa.array([b"a", b"\xff", b"\xed\xa0\x80"])}))
    for flags, row in (((), 2), (("--lone-surrogates", "replace"), 2)):
        with pytest.raises(ConfigError, match=f"in.parquet, row {row}: not UTF-8"):
            corpus(tmp_path, "--input", path, *flags)


def test_missing_nested_key_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"meta": {"text": "a"}}\n{"meta": null}\n')
    with pytest.raises(ConfigError, match=r"in.jsonl:2: the key 'meta.text' is missing \(--json-keys\)"):
        corpus(tmp_path, "--input", str(tmp_path / "in.jsonl"), "--json-keys", "meta.text")


@pytest.mark.parametrize(
    ("raw", "replaced"),
    [
        (rb'{"text": "a\ud800b"}', "a\ufffdb"),
        (rb'{"text": "\ud83d\ude42 \udc00"}', "🙂 \ufffd"),
        (rb'{"text": "\udc00\ud800"}', "\ufffd\ufffd"),
        (b'{"text": "a\xed\xa0\x80b"}', "a\ufffdb"),
        (rb'{"text": ["\ud800", "ok"]}', "\ufffdok"),
    ],
)
def test_lone_surrogates_are_rejected_or_replaced(tmp_path: Path, raw: bytes, replaced: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "x"}\n' + raw + b"\n")
    source = str(tmp_path / "in.jsonl")
    with pytest.raises(ConfigError, match=r"in.jsonl:2: (a lone surrogate|not UTF-8)"):
        corpus(tmp_path, "--input", source)
    ids, _ = corpus(tmp_path, "--input", source, "--lone-surrogates", "replace")
    assert ids == np.array([ord("x"), 256, *replaced.encode(), 256], np.uint16).tobytes()


def test_duplicate_input_file_is_read_once_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "link.jsonl").symlink_to("b.jsonl")
    assert find_inputs(["b.jsonl", "*.jsonl", str(tmp_path / "a.jsonl")]) == ["b.jsonl", "a.jsonl"]
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        "warning: --input *.jsonl repeats b.jsonl, which is read once.",
        "warning: --input *.jsonl repeats b.jsonl, which is read once.",
        f"warning: --input {tmp_path}/a.jsonl repeats a.jsonl, which is read once.",
    ]
    assert find_inputs(["a.jsonl", "b.jsonl"]) == ["a.jsonl", "b.jsonl"] and not capsys.readouterr().err


def test_home_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in.jsonl").write_bytes(LINES)
    words = ["--input", "~/*.jsonl", "--output-prefix", "~/out", "--tokenizer-type", "ByteTokenizer"]
    code, _, errors = run_tool(monkeypatch, capsys, "preprocess_data", words)
    assert code == 0, errors
    assert run_tool(monkeypatch, capsys, "inspect_dataset", ["~/out_text_document"])[0] == 0
    (tmp_path / "blend.yaml").write_text("~/a: 0.3\n~/b: 0.7\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("save: ~/run\ntokenizer_model: ~/tok.model\ndata_path: [0.3, ~/a, 0.7, ~/b]\nseed: 3\n")
    config = parse(["--config", "~/recipe.yaml", "--load=~/run", "--valid-data-path", "x=~/v"]).config
    assert (config.checkpoint.save, config.checkpoint.load) == (f"{tmp_path}/run", f"{tmp_path}/run")
    assert config.tokenizer.tokenizer_model == f"{tmp_path}/tok.model"
    assert config.data.data_path == ["0.3", f"{tmp_path}/a", "0.7", f"{tmp_path}/b"]
    assert config.data.valid_data_path == {"x": [f"{tmp_path}/v"]}
    assert os.path.expanduser("~") == str(tmp_path)  # noqa: PTH111


def test_every_path_setting_is_expanded() -> None:
    names = {setting.name for _, setting, _ in settings()}
    ending = {name for name in names if name.endswith(("_path", "_dir", "_file", "_model", "_load"))}
    assert ending <= PATH_SETTINGS <= names
