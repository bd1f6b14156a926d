"""Bulk extraction of texts from JSON lines and table rows to Arrow arrays, without a Python object per document."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

MAX_BYTES = (1 << 31) - 2  # largest block that Arrow's JSON reader accepts


def json_columns(content: bytes, keys: Sequence[str]) -> list[pa.LargeStringArray] | None:
    """Return one array of texts per key, or None unless every line is a single JSON object with a text for each key.

    Arrow's reader differs from Python's: it rejects repeated keys and lone surrogates, and accepts integers and nesting
    of any size in keys that are not read.
    """
    import pyarrow.json

    if any("." in key for key in keys):
        return None  # possibly a path into an object
    body = content.removesuffix(b"\n").removesuffix(b"\r")
    lines = body.count(b"\n") + 1
    separated = body.count(b"}\n{") + body.count(b"}\r\n{") + 1
    if len(content) > MAX_BYTES or separated != lines or not (body.startswith(b"{") and body.endswith(b"}")):
        return None
    try:
        if not content.isascii():
            content.decode("utf-8")  # Arrow does not validate the values of other keys
        table = pyarrow.json.read_json(
            pa.BufferReader(content),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(content) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pa.schema([(key, pa.string()) for key in keys]), unexpected_field_behavior="ignore"
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return None
    return _checked(table, keys, lines)


def table_columns(content: bytes, keys: Sequence[str]) -> list[pa.LargeStringArray] | None:
    """Return the columns of an Arrow stream, or None unless all are valid UTF-8 strings without nulls."""
    table = pa.ipc.open_stream(content).read_all()
    return _checked(table, keys, table.num_rows)


def _checked(table: pa.Table, keys: Sequence[str], rows: int) -> list[pa.LargeStringArray] | None:
    if table.num_rows != rows or not set(keys) <= set(table.column_names):
        return None
    arrays = []
    for key in keys:
        column = table.column(key)
        if column.type not in (pa.string(), pa.large_string()) or column.null_count:
            return None
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            return None
        arrays.append(pa.concat_arrays(column.cast(pa.large_string()).chunks))
    return arrays
