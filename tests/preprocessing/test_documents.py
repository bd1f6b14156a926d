"""Input blocks: the same documents for every input format, block size and shard count, and after resuming."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_slm.preprocessing import documents as module
from megatron_slm.preprocessing.documents import (
    Block,
    InputChunk,
    find_inputs,
    first_line,
    iter_documents,
    read_blocks,
)
from megatron_slm.preprocessing.inputs import InputFormat, detect_format
from megatron_slm.preprocessing.shards import split_inputs
from megatron_slm.preprocessing.text_reader import BadDocuments, TextReader, read_texts
from megatron_slm.runtime.errors import ConfigError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
TEXTS = [f"text {number} " + "é🙂" * (number % 7) for number in range(200)]
REUSED = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def texts_in(blocks: list[Block]) -> list[str]:
    found = []
    for block in blocks:
        for _, document in iter_documents(block.load(), block.chunk.input_format, ["text"]):
            if isinstance(document, tuple):
                found.append(document[0])
            elif document.strip():
                found.append(
                    json.loads(document)["text"] if block.chunk.input_format is InputFormat.JSON else document.decode()
                )
    return found


def read(files: list[str]) -> list[tuple[int, Any]]:
    """(line, text) of every document."""
    found = read_texts(files, TextReader(["text"]), BadDocuments(skip=False))
    return [(line, texts[0]) for _, line, texts in found]


def write_table(path: Path, texts: list[str | None], rows: int = 30) -> Path:
    table = pa.table({"number": list(range(len(texts))), "text": texts})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        start = pa.ipc.new_stream if path.name.startswith("stream") else pa.ipc.new_file
        with path.open("wb") as file, start(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 500)


@pytest.mark.parametrize("pack", PACK)
def test_compression_does_not_change_the_documents(tmp_path: Path, pack: str) -> None:
    path = tmp_path / f"in.jsonl{pack}"
    half = len(TEXTS) // 2  # two members one behind the other, as parallel compressors write them
    path.write_bytes(PACK[pack](lines(TEXTS[:half])) + PACK[pack](lines(TEXTS[half:])))
    blocks = list(read_blocks(InputChunk(str(path), detect_format(str(path))), ["text"]))
    assert texts_in(blocks) == TEXTS
    assert len(blocks) > 1 or pack
    assert sum(block.read for block in blocks) == path.stat().st_size
    assert [line for line, _ in read([str(path)])] == list(range(1, len(TEXTS) + 1))


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow", "stream.arrow", "in.feather"])
def test_tables_give_the_same_documents(tmp_path: Path, name: str) -> None:
    path = str(write_table(tmp_path / name, TEXTS))
    blocks = list(read_blocks(InputChunk(path, detect_format(path)), ["text"]))
    assert texts_in(blocks) == TEXTS and len(blocks) > 3
    assert [text for _, text in read([path])] == TEXTS


def test_standard_input_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines(TEXTS))))
    assert [text for _, text in read(["-"])] == TEXTS
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl.gz", gzip.compress(lines(TEXTS[:100])))
    memory.pipe("/corpus/b.jsonl.gz", gzip.compress(lines(TEXTS[100:])))
    (tmp_path / "c.jsonl").write_bytes(lines(["last"]))
    found = find_inputs(["memory://corpus/*.gz", f"file://{tmp_path}/c.jsonl"])
    assert [text for _, text in read(found)] == [*TEXTS, "last"]
    write_table(tmp_path / "t.parquet", TEXTS)
    memory.pipe("/corpus/t.parquet", (tmp_path / "t.parquet").read_bytes())
    assert len(read(["memory://corpus/t.parquet"])) == len(TEXTS)


def test_globs_are_sorted_and_paths_keep_their_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "z.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_inputs([str(tmp_path / "z.jsonl"), str(tmp_path / "[ab].jsonl"), str(tmp_path / "**/c.jsonl")])
    assert [Path(name).name for name in found] == ["z.jsonl", "a.jsonl", "b.jsonl", "c.jsonl"]


@pytest.mark.parametrize("pack", ["", ".gz"])
@REUSED
@given(data=st.data())
def test_paragraphs_match_a_simple_definition(tmp_path: Path, pack: str, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="ab \t\n\r", max_size=400)).encode() * data.draw(st.sampled_from([1, 9]))
    path = tmp_path / f"in.txt{pack}"
    path.write_bytes(PACK[pack](text))
    expected: list[bytes] = []
    is_open = False
    for line in text.split(b"\n"):
        if line.strip():
            expected = [*expected[:-1], expected[-1] + b"\n" + line] if is_open else [*expected, line]
        is_open = bool(line.strip())
    blocks = list(read_blocks(InputChunk(str(path), InputFormat.PARAGRAPHS), ["text"]))
    assert [chunk.removesuffix("\n").encode() for chunk in texts_in(blocks)] == expected


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.zst", "in.parquet", "in.arrow", "in.txt"])
def test_resuming_after_any_block_gives_the_rest(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(("parquet", "arrow")):
        write_table(path, TEXTS)
    else:
        content = "\n\n".join(TEXTS).encode() if name == "in.txt" else lines(TEXTS)
        path.write_bytes(PACK[".zst" if name.endswith("zst") else ""](content))
    chunk = InputChunk(str(path), detect_format(name))
    blocks = list(read_blocks(chunk, ["text"]))
    for place, block in enumerate(blocks):
        rest = list(read_blocks(chunk, ["text"], block.end))
        assert texts_in(rest) == texts_in(blocks[place + 1 :])


@REUSED
@given(lengths=st.lists(st.integers(0, 900), max_size=40), count=st.integers(1, 9))
def test_shards_partition_the_input_in_order_and_are_balanced(tmp_path: Path, lengths: list[int], count: int) -> None:
    texts = [f"{number}:" + "x" * length for number, length in enumerate(lengths)]
    third = len(texts) // 3
    (tmp_path / "a.jsonl").write_bytes(lines(texts[:third]))
    (tmp_path / "b.txt").write_bytes("\n\n".join(texts[third : 2 * third]).encode())
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(texts[2 * third :])))
    write_table(tmp_path / "d.parquet", texts, rows=3)
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.jsonl.gz", "d.parquet")]
    whole = [block for chunk in split_inputs(files, "paragraph", None) for block in read_blocks(chunk, ["text"])]
    shards = [split_inputs(files, "paragraph", (number, count)) for number in range(count)]
    found = [texts_in([block for chunk in chunks for block in read_blocks(chunk, ["text"])]) for chunks in shards]
    assert [text.rstrip("\n") for shard in found for text in shard] == [text.rstrip("\n") for text in texts_in(whole)]
    for chunks in shards:
        for chunk in chunks:
            rows = [row for row, _ in enumerate(texts, 1)]
            if chunk.input_format is InputFormat.TABLE:
                assert first_line(chunk) == rows[3 * chunk.begin] if chunk.begin < len(rows) / 3 else True
            elif chunk.begin:
                assert first_line(chunk) == 1 + Path(chunk.file).read_bytes()[: chunk.begin].count(b"\n")


def test_shards_of_one_large_file_are_balanced(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines([text * 20 for text in TEXTS]))
    sizes = [
        chunk.end - chunk.begin for number in range(7) for chunk in split_inputs([str(path)], "paragraph", (number, 7))
    ]  # type: ignore[operator]
    assert sum(sizes) == path.stat().st_size and max(sizes) - min(sizes) < path.stat().st_size / 7 / 10


def test_long_document_is_one_block_with_bounded_copying(tmp_path: Path) -> None:
    for name in ("in.jsonl", "in.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(PACK[path.suffix if path.suffix == ".gz" else ""](lines(["a", "x" * 10_000_000, "b"])))
        assert [
            len(text) for text in texts_in(list(read_blocks(InputChunk(str(path), InputFormat.JSON), ["text"])))
        ] == [1, 10**7, 1]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_documents_before_a_truncation_are_kept(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in.jsonl{suffix}"
    whole = PACK[suffix](lines(TEXTS[:100])) + PACK[suffix](lines(TEXTS[100:]))
    path.write_bytes(whole[:-20])
    blocks = list(read_blocks(InputChunk(str(path), InputFormat.JSON), ["text"]))
    assert "truncated" in blocks[-1].damage and not any(block.damage for block in blocks[:-1])
    found = texts_in(blocks)
    assert found == TEXTS[: len(found)] and len(found) >= 100
    path.write_bytes(whole[:50] + b"\x00\xff" * 20 + whole[90:])
    blocks = list(read_blocks(InputChunk(str(path), InputFormat.JSON), ["text"]))
    assert suffix in blocks[-1].damage


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module_name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module_name, None)
    with pytest.raises(ConfigError, match=r"--input s3://x/y.jsonl.*pip install s3fs"):
        find_inputs(["s3://x/y.jsonl"])
    with pytest.raises(ConfigError, match=r"--input gs://x/y.jsonl.*pip install gcsfs"):
        find_inputs(["gs://x/y.jsonl"])
    with pytest.raises(ConfigError, match=r"does not support the protocol nonsense://"):
        find_inputs(["nonsense://x/y.jsonl"])
    with pytest.raises(ConfigError, match=r"memory://nowhere.jsonl: no such file"):
        find_inputs(["memory://nowhere.jsonl"])
