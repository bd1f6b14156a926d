"""Reading of Parquet and Arrow files in batches of about one block, serialized as Arrow streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron_slm.preprocessing.inputs import (
    PARQUET,
    DamagedFile,
    InputFormat,
    detect_format,
    is_remote,
    open_input,
    suffix_of,
)
from megatron_slm.runtime.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"ARROW1"  # start of an Arrow file; Arrow streams have no magic
MAX_ROWS = 1 << 16  # rows decoded per batch


def read_batches(
    name: str, keys: Sequence[str], block: int, groups: tuple[int, int | None], skip: int
) -> Iterator[tuple[bytes, int, float]]:
    """Yield (Arrow stream, row count, fraction of the file) of consecutive rows.

    Args:
        name: a .parquet, .arrow or .feather file.
        keys: columns to read; none: all columns, of any type.
        block: target size of a batch in bytes.
        groups: first and last (exclusive; None: all) row group of a Parquet file.
        skip: number of initial rows to skip.

    Raises:
        DamagedFile: the file is truncated or of another format.
        ConfigError: a column is missing or is not text.
    """
    with _reading(), _open(name) as file:
        reading = _parquet(file, name, keys, block, *groups) if is_parquet(name) else _arrow(file, name, keys)
        for read, share in reading:
            batch = _by_key(read, keys)
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            rows = max(1, batch.num_rows * block // max(batch.nbytes, 1))
            for begin in range(skip, batch.num_rows, rows):
                part = batch.slice(begin, rows)
                yield _serialize(part), part.num_rows, share * part.num_rows / batch.num_rows
            skip = 0


def decode_rows(stream: bytes, keys: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Return the values of each row of a serialized batch, in the order of ``keys``."""
    return zip(*(_values(column) for column in _read_stream(stream).select(list(keys)).columns), strict=True)


def decode_objects(stream: bytes) -> Iterator[dict[str, Any]]:
    """Yield each row of a serialized batch as an object."""
    table = _read_stream(stream)
    for row in zip(*map(_values, table.columns), strict=True):
        yield dict(zip(table.column_names, row, strict=True))


def _read_stream(stream: bytes) -> pa.Table:
    import pyarrow as pa

    return pa.ipc.open_stream(stream).read_all()


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Return a column as Python values; a text that is not UTF-8 as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else b""


def _by_key(batch: pa.RecordBatch, keys: Sequence[str]) -> pa.RecordBatch:
    """Return a batch with one column per key, extracting struct fields; without keys, the entire batch."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = []
    if not keys:
        return batch
    for key in keys:
        top, *inner = _path(batch.schema, key)
        column = batch.column(top)
        columns.append(pc.struct_field(column, inner) if inner else column)
    return pa.RecordBatch.from_arrays(columns, names=list(keys))


def _path(schema: pa.Schema, key: str) -> list[str]:
    """Return the path to a column: ``key`` itself if it is a column name, otherwise its dot-separated parts."""
    return [key] if key in schema.names else key.split(".")


def is_parquet(name: str) -> bool:
    """Return whether a file name has a Parquet suffix."""
    return suffix_of(name) in PARQUET


def row_groups(name: str) -> list[tuple[int, int]]:
    """Return (rows, compressed bytes) of each row group of a Parquet file.

    Raises:
        DamagedFile: the file is truncated or of another format.
    """
    import pyarrow.parquet as pq

    with _reading(), _open(name) as file:
        metadata = pq.ParquetFile(file).metadata
        groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
        return [(g.num_rows, sum(g.column(c).total_compressed_size for c in range(g.num_columns))) for g in groups]


def check_tables(names: Sequence[str], keys: Sequence[str]) -> None:
    """Validate that all local tables among the input files have the columns.

    Raises:
        ConfigError: a column is missing or is not text.
    """
    for name in names:
        if detect_format(name) is InputFormat.TABLE and not is_remote(name):
            check_columns(name, keys)


def check_columns(name: str, keys: Sequence[str]) -> None:
    """Validate that a table has the columns; damage is reported later, when the file is read.

    Raises:
        ConfigError: a column is missing or is not text.
    """
    import pyarrow.parquet as pq

    try:
        with _reading(), _open(name) as file:
            schema = pq.ParquetFile(file).schema_arrow if is_parquet(name) else _open_arrow(file).schema
            _check_schema(name, schema, keys)
    except DamagedFile:
        return


@contextmanager
def _reading() -> Iterator[None]:
    """Convert Arrow's errors about file content to DamagedFile; I/O errors propagate."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowInvalid as error:
        raise DamagedFile(f"truncated or of another format ({error})") from error
    except OSError as error:  # OSErrors raised by Arrow have no errno
        if error.errno is not None:
            raise
        raise DamagedFile(f"truncated or of another format ({error})") from error


def _parquet(
    file: Any, name: str, keys: Sequence[str], block: int, first: int, last: int | None
) -> Iterator[tuple[pa.RecordBatch, float]]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file, buffer_size=block)  # reads page by page instead of entire row groups
    _check_schema(name, parquet.schema_arrow, keys)
    groups = range(parquet.metadata.num_row_groups)[first:last]
    total = max(sum(parquet.metadata.row_group(place).num_rows for place in groups), 1)
    for place in groups:
        group = parquet.metadata.row_group(place)
        rows = min(MAX_ROWS, max(1, group.num_rows * block // max(group.total_byte_size, 1)))
        for batch in parquet.iter_batches(rows, row_groups=[place], columns=list(dict.fromkeys(keys)) or None):
            yield batch, batch.num_rows / total


def _arrow(file: Any, name: str, keys: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
    reader = _open_arrow(file)
    _check_schema(name, reader.schema, keys)
    if hasattr(reader, "num_record_batches"):
        for place in range(reader.num_record_batches):
            yield reader.get_batch(place), 1 / reader.num_record_batches
    else:
        for batch in reader:  # the batch count of a stream is unknown: the progress bar jumps at the end
            yield batch, 0.0


def _open(name: str) -> Any:
    """Open a file for Arrow; local files are read natively by Arrow."""
    import pyarrow as pa

    return open_input(name) if is_remote(name) else pa.OSFile(name)


def _open_arrow(file: Any) -> Any:
    import pyarrow as pa

    is_file = file.read(len(MAGIC)) == MAGIC
    file.seek(0)
    return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)


def _check_schema(name: str, schema: pa.Schema, keys: Sequence[str]) -> None:
    import pyarrow.types as kinds

    lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, kinds.is_list_view, kinds.is_large_list_view)
    for key in keys:
        kind = _type_of(name, schema, key)
        inner = kind.value_type if any(is_it(kind) for is_it in lists) else kind
        inner = inner.value_type if kinds.is_dictionary(inner) else inner
        texts = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_null)
        bytes_of_texts = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_fixed_size_binary)
        if not any(is_it(inner) for is_it in (*texts, *bytes_of_texts)):
            raise ConfigError(f"--json-keys {key}: the column of {name} has type {kind}, but must be string or binary.")


def _type_of(name: str, schema: pa.Schema, key: str) -> pa.DataType:
    """Return the type of a column or struct field.

    Raises:
        ConfigError: the column does not exist.
    """
    import pyarrow.types as kinds

    fields = {field.name: field.type for field in schema}
    kind = None
    for place in _path(schema, key):
        if place not in fields:
            raise ConfigError(f"--json-keys {key}: {name} has no such column; its columns are {_columns(schema)}.")
        kind = fields[place]
        fields = {field.name: field.type for field in kind} if kinds.is_struct(kind) else {}
    return kind


def _columns(schema: pa.Schema) -> str:
    import pyarrow.types as kinds

    names = []
    for field in schema:
        inside = [f"{field.name}.{inner.name}" for inner in field.type] if kinds.is_struct(field.type) else []
        names += inside or [field.name]
    return ", ".join(names)


def _serialize(batch: pa.RecordBatch) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
