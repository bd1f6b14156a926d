"""Corpus inspection: statistics of intact corpora, and detection and location of every kind of damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_slm.corpus import index as index_module
from megatron_slm.corpus.checks import check_corpus
from megatron_slm.corpus.index import HEADER, read_index
from megatron_slm.corpus.inspection import Lengths, document_ids, open_corpus
from megatron_slm.corpus.integrity import check_integrity
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.corpus_files import Documents, build, run_tool, synthetic

BYTES = [[list(b"hello world\n"), list(b"again")], [], [[*b"caf\xc3\xa9", 256]], [[65] * 300]]
AT = {"lengths": HEADER.size, "pointers": HEADER.size + 4 * 4, "bounds": HEADER.size + 12 * 4}  # of 4 sequences


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: run_tool(monkeypatch, capsys, "inspect_dataset", list(map(str, arguments)))


ids = st.lists(st.integers(0, 99), min_size=1, max_size=9)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(ids, max_size=3), max_size=8), st.integers(1, 5))
def test_statistics_of_an_intact_corpus(tmp_path: Path, documents: Documents, chunk: int) -> None:
    """The chunk size, which may be far below the corpus size, does not change the statistics."""
    prefix = build(tmp_path / "corpus", documents)
    plain = sorted(sum(map(len, document)) for document in documents)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("index", "inspection", "integrity"):
            patch.setattr(f"megatron_slm.corpus.{module}.CHUNK", chunk)
        patch.setattr(index_module.chunks, "__defaults__", (chunk,))
        assert check_integrity(prefix, 100).damage == []
        lengths = Lengths.from_index(open_corpus(prefix))
    assert np.repeat(lengths.tokens, lengths.documents).tolist() == plain
    assert sum(count for _, _, count in lengths.doubling_bins()) == len(plain)
    for shortest, longest, count in lengths.doubling_bins():
        assert count == sum(shortest <= length <= longest for length in plain)
    if plain:
        assert lengths.mean == pytest.approx(np.mean(plain))
        for share in (0.0, 0.1, 0.5, 0.9, 1.0):
            assert lengths.quantile(share) == np.quantile(plain, share, method="inverted_cdf")
    for number, document in enumerate(documents):
        whole = [token for sequence in document for token in sequence]
        assert document_ids(open_corpus(prefix), number).tolist() == whole
        assert document_ids(open_corpus(prefix), number - len(documents)).tolist() == whole


def test_tool_output(tmp_path: Path, run: Callable[..., tuple[Any, str, str]]) -> None:
    prefix, plot = build(tmp_path / "corpus", BYTES), tmp_path / "plot.png"
    decode = ("--tokenizer-type", "ByteTokenizer")
    code, out, err = run(prefix, "--check", "--documents", 0, 2, -1, "--max-tokens", 20, "--plot", plot, *decode)
    assert (code, err) == (0, "")
    for text in (
        "is intact, and all ids are below 257",
        "hello world\nagain",
        "café",
        "A" * 20,
        "300 tokens",
        "323",
    ):
        assert text in out, text
    assert "A" * 21 not in out
    assert plot.read_bytes()[:4] == b"\x89PNG" and plot.stat().st_size > 5000
    code, out, _ = run(prefix, "--documents", 1, 2)
    assert max(map(len, out.splitlines())) < 200, "headings fit a line of a file"
    assert code == 0 and "99 97 102 195 169 256" in out and "not recorded" in out


@pytest.mark.parametrize("documents", [[], [[]], [[[1]]], [[[1]], [[2, 3]]]], ids=["0", "1 empty", "1", "2"])
def test_corpora_with_0_1_and_2_documents(
    tmp_path: Path, run: Callable[..., tuple[Any, str, str]], documents: Documents
) -> None:
    prefix = build(tmp_path / "corpus", documents, tokenizer="aa")
    metadata = json.loads((tmp_path / "corpus.corpus.json").read_text())
    code, out, err = run(prefix, "--check", "--plot", tmp_path / "plot.png")
    assert (code, err) == (0, ""), err
    assert f"│ {len(documents)} " in out and "SentencePieceTokenizer, 100 entries, aa" in out
    assert metadata["documents"] == len(documents) and (tmp_path / "plot.png").is_file()


def patched(name: str, place: int, kind: str, value: int) -> Callable[[Path], None]:
    """Overwrite one number of the index."""

    def damage(directory: Path) -> None:
        content = bytearray((directory / "c.idx").read_bytes())
        struct.pack_into(kind, content, AT[name] + place * struct.calcsize(kind), value)
        (directory / "c.idx").write_bytes(content)

    return damage


def edited(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    def damage(directory: Path) -> None:
        path = directory / f"c{suffix}"
        path.write_bytes(change(path.read_bytes()))

    return damage


def with_metadata(**changes: Any) -> Callable[[Path], Any]:
    def damage(directory: Path) -> None:
        metadata = json.loads((directory / "c.corpus.json").read_text())
        (directory / "c.corpus.json").write_text(json.dumps({**metadata, **changes}))

    return damage


IDENTITY = {"name": "ByteTokenizer", "fingerprint": "ff", "vocab_size": 257}
DAMAGE: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("no .bin", lambda f: (f / "c.bin").unlink(), ["c.bin is missing"]),
    ("no .idx", lambda f: (f / "c.idx").unlink(), ["c.idx is missing"]),
    ("foreign", edited(".idx", lambda b: b"PK" + b[2:]), ["is not a Megatron-Core index"]),
    ("header cut", edited(".idx", lambda b: b[:20]), ["is truncated: 20 bytes"]),
    ("index cut", edited(".idx", lambda b: b[:-1]), ["its header requires"]),
    ("modes behind", edited(".idx", lambda b: b + bytes(4)), ["belongs to a multimodal corpus"]),
    ("bytes cut", edited(".bin", lambda b: b[:30]), ["truncated: 30 bytes of 646", "document 0, sequence 1, byte 24"]),
    ("no bytes", edited(".bin", lambda b: b""), ["truncated: 0 bytes of 646", "document 0, sequence 0, byte 0"]),
    ("bytes behind", edited(".bin", lambda b: b + b"123"), ["3 excess bytes from byte 646 on"]),
    ("big id", edited(".bin", lambda b: b[:34] + b"\x01\x01" + b[36:]), ["document 2, sequence 2, byte 34: id 257"]),
    ("many big ids", edited(".bin", lambda b: b"\xff" * len(b)), ["sequence 0, byte 0: id 65535", "318 more places"]),
    ("negative length", patched("lengths", 2, "<i", -6), ["negative lengths", "document 2, sequence 2: -6 tokens"]),
    ("other length", patched("lengths", 1, "<i", 6), ["sequence 2: offset 34, but the preceding", "sum to 36"]),
    ("offset", patched("pointers", 3, "<q", 1 << 40), ["document 3, sequence 3: offset 1099511627776", "sum to 46"]),
    ("first document", patched("bounds", 0, "<q", 1), ["the first document starts at sequence 1"]),
    ("last document", patched("bounds", 4, "<q", 9), ["ends at sequence 9 of 4", "sequence 9 of 4"]),
    ("order", patched("bounds", 2, "<q", 0), ["document 1: starts at 2, ends at 0"]),
    ("recorded counts", with_metadata(documents=5, tokens=1), ["5 documents, but", "1 tokens, but", "contains 323"]),
    (
        "recorded vocabulary",
        with_metadata(tokenizer=dict(IDENTITY, vocab_size=200)),
        ["id 256", "200"],
    ),
    ("floats", edited(".idx", lambda b: b[:17] + b"\x07" + b[18:]), ["float32 is not an integer dtype"]),
]


@pytest.mark.parametrize(("damage", "messages"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_reported(
    tmp_path: Path,
    run: Callable[..., tuple[Any, str, str]],
    damage: Callable[[Path], Any],
    messages: list[str],
) -> None:
    prefix = build(tmp_path / "c", BYTES, tokenizer="ff")
    with_metadata(tokenizer=IDENTITY)(tmp_path)
    assert run(prefix, "--check")[0] == 0
    damage(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = run(prefix, "--check")
    assert code == 2
    for message in messages:
        assert message in err, err
    assert "is damaged. Recreate it with tools/preprocess_data.py, or" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_document_that_ends_before_its_start_is_found_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    prefix = build(tmp_path / "c", BYTES)
    patched("bounds", 2, "<q", 0)(tmp_path)
    monkeypatch.setattr("megatron_slm.corpus.integrity.CHUNK", chunk)
    (damage,) = check_integrity(prefix).damage
    assert damage.places == ("document 1: starts at 2, ends at 0",)


def test_invalid_id_beyond_2_gib_is_located(tmp_path: Path) -> None:
    """Positions and byte offsets exceed 32 bits; the corpus is a sparse file."""
    long = 2**30 + 5
    prefix = synthetic(tmp_path / "c", [long, 4, 3], [0, 1, 3], np.uint16)
    with (tmp_path / "c.bin").open("r+b") as file:
        file.seek(2 * (long + 5))
        file.write(b"\xff\xff")
    [damage] = check_integrity(prefix, 100).damage
    assert damage.places == (f"document 1, sequence 2, byte {2 * (long + 5):,}: id 65535",)
    assert document_ids(read_index(prefix), 1).tolist() == [0, 0, 0, 0, 0, 65535, 0]


def test_output_prefix_of_the_preprocessing_is_corrected(tmp_path: Path) -> None:
    synthetic(tmp_path / "more_text_document", [3], [0, 1], np.uint16)
    with pytest.raises(ConfigError, match=rf"more\.bin is missing\. Did you mean {tmp_path}/more_text_document\?"):
        check_corpus(str(tmp_path / "more"), "--data-path")


BAD: list[tuple[list[str], str]] = [
    (["nowhere"], "nowhere.bin is missing"),
    (["c.bin"], "Omit .bin from the prefix"),
    (["c", "--documents", "4"], "--documents 4: {}/c has 4 documents, numbered from 0"),
    (["c", "--documents", "-5"], "--documents -5"),
    (["c", "--documents", "x"], "invalid int value: 'x'"),
    (["c", "--plot", "/nowhere/plot.png"], "--plot /nowhere/plot.png cannot be written"),
    (["c", "--plot", "plot.xyz"], "--plot {}/plot.xyz cannot be written"),
    (["c", "--tokenizer-type", "SentencePieceTokenizer"], "requires --tokenizer-model"),
    (["c", "--tokenizer-type", "ByteTokenizer"], "was made with SentencePieceTokenizer of vocabulary size 100"),
    (["c", "--tokenizer-type", "Magic"], "--tokenizer-type must be one of"),
    ([], "the following arguments are required: prefix"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input(
    tmp_path: Path, run: Callable[..., tuple[Any, str, str]], arguments: list[str], message: str
) -> None:
    build(tmp_path / "c", BYTES, tokenizer="ff")
    files = {"nowhere", "c", "c.bin", "plot.xyz"}
    code, _, err = run(*(str(tmp_path / argument) if argument in files else argument for argument in arguments))
    assert code == 2
    assert message.format(tmp_path) in err, err


def test_damaged_corpus_is_rejected(tmp_path: Path) -> None:
    prefix = build(tmp_path / "c", BYTES)
    (tmp_path / "c.bin").write_bytes(b"12")
    with pytest.raises(ConfigError, match=r"has 2 bytes.*Run --check"):
        open_corpus(prefix)
