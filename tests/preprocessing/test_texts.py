"""Text extraction: results are independent of the other lines of a block and of the JSON reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_slm.preprocessing.inputs import InputFormat
from megatron_slm.preprocessing.text_reader import (
    ERROR,
    REPLACE,
    UNREADABLE,
    BadDocuments,
    Text,
    TextReader,
    describe_error,
    read_texts,
)
from megatron_slm.preprocessing.texts import read_block_texts

VALUES = [
    *(
        '"a"',
        '"é\\n😀"',
        '"\\ud83d\\ude00"',
        '"\\ud800"',
        '"\\udc00x"',
        '"\\u0000"',
        '"\\/"',
        '""',
        '"' + "long " * 5000 + '"',
    ),
    *("12", "-0", "1E400", "9" * 5000, "-" + "9" * 5000, "01", "1.", ".5", "+1", "-", "0x1"),
    *("NaN", "Infinity", "-Infinity", "Inf", "-Inf", "-NaN", "nan", "true", "null", "tru", "None"),
    *(
        "[]",
        "{}",
        "[1,]",
        '{"a":1,}',
        "{,}",
        '["a", "b"]',
        '{"text": "in"}',
        "[" * 2000 + "]" * 2000,
        '{"a":' * 2000 + "1" + "}" * 2000,
    ),
    *('"\x01"', '"a\x00b"', '"\x7f"', '"\\x"', '"\\u00zz"', '"a', "'a'", '"a" "b"', "/*c*/1", "1//c", ""),
    *('"\ufeff"', '"\u2028\x85"', '"\udcff"', '"\udced\udca0\udc80"', '"\udcc0\udc80"'),
]
KEYS = ['"text"', '"te\\u0078t"', '"x"', '"meta"', '""', '"meta.text"', "text", '"text']
WHOLE = [
    "",
    " ",
    "\r",
    "\x0c",
    "{}",
    "{",
    "}",
    "[]",
    '"text"',
    "null",
    "\ufeff",
    "\x00",
    '{"text":"a"}{"text":"b"}',
    '{"text":"a"},',
]
AROUND = ["", "", "", " ", "\t", "\r", "\x00", "\x0c", "\ufeff", ",", "//c"]
value = st.one_of(st.sampled_from(VALUES), st.text(max_size=5).map(json.dumps))
pair = st.builds("{}:{}".format, st.sampled_from(KEYS), value)
record = st.lists(pair, max_size=3).map(lambda pairs: "{" + ",".join(pairs) + "}")
simple = st.builds('{{"text":{},"x":{}}}'.format, st.text(max_size=5).map(json.dumps), value)
line = st.one_of(
    simple,
    simple,
    st.builds("{}{}{}".format, st.sampled_from(AROUND), st.one_of(record, simple), st.sampled_from(AROUND)),
    st.sampled_from(WHOLE),
).map(lambda text: text.replace("\n", "\\n").encode("utf-8", "surrogateescape"))
Found = list[tuple[int, list[Text] | str]]


def one_by_one(content: bytes, reader: TextReader) -> Found:
    """(line, its texts by key or why there are none), read without the others."""
    found: Found = []
    for number, document in enumerate(content.removesuffix(b"\n").split(b"\n")):
        if document.strip():
            try:
                found.append((number, reader(document, True)))
            except UNREADABLE as error:
                found.append((number, describe_error(error)))
    return found


def as_block(content: bytes, reader: TextReader) -> Found:
    texts = read_block_texts(content, InputFormat.JSON, reader, None)
    found: Found = [*texts.bad]
    for place, number in enumerate(texts.lines):
        columns = [column.document(place) for column in texts.columns]
        found.append((number, [column.texts.to_pylist() for column in columns]))
    return sorted(found)


def as_lists(found: Found) -> Found:
    return [(n, t if isinstance(t, str) else [[x] if isinstance(x, str) else x for x in t]) for n, t in found]


@settings(max_examples=400, deadline=None)
@given(
    lines=st.lists(line, max_size=4),
    joint=st.sampled_from([b"\n", b"\r\n"]),
    end=st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]),
    keys=st.sampled_from([["text"], ["text", "x"], ["meta.text"], ["missing"]]),
    surrogates=st.sampled_from([ERROR, REPLACE]),
)
@example([b'{"text":"a","x":' + b"9" * 5000 + b"}"], b"\n", b"\n", ["text"], ERROR)
@example([b'{"text":"a","x":-Inf}'], b"\n", b"\n", ["text"], ERROR)
@example([b'{"text":"a","x":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"text":1}'], b"\n", b"\n", ["text"], ERROR)
def test_arrow_and_python_readers_agree(
    lines: list[bytes], joint: bytes, end: bytes, keys: list[str], surrogates: str
) -> None:
    content = joint.join(lines) + end
    reader = TextReader(keys, lone_surrogates=surrogates)
    assert as_block(content, reader) == as_lists(one_by_one(content, reader))


@pytest.mark.parametrize(
    "unread", ["9" * 5000, "[" * 100_000 + "]" * 100_000, "NaN", '{"text":1}', '"' + "x" * (1 << 20) + '"']
)
def test_unread_keys_may_have_any_value(tmp_path: Path, unread: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"text":"a","x":{unread}}}\n')
    found = list(read_texts([str(path)], TextReader(["text"]), BadDocuments(skip=False)))
    assert [texts for _, _, texts in found] == [["a"]]
