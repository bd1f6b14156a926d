"""Extraction of texts from JSON lines and table rows, and reporting of unreadable documents."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_slm.preprocessing.arrow_columns import json_columns
from megatron_slm.preprocessing.documents import InputChunk, Values, is_blank, iter_documents, read_blocks
from megatron_slm.preprocessing.inputs import BYTE_ORDER_MARK, InputFormat, detect_format
from megatron_slm.runtime.errors import ConfigError

ERROR, REPLACE = "error", "replace"  # --lone-surrogates
SURROGATE = re.compile("[\ud800-\udfff]")
UNREADABLE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # errors of a single document
SHOWN_ERRORS = 5
OPENINGS = ("{", "[", "[{")  # first lines of multi-line JSON
ONE_LINE = "; each line must be one object: convert a list with jq -c '.[]' FILE, longer objects with jq -c . FILE"
Text = str | list[str]  # one sequence, or one for each text of a JSON list


@dataclass(frozen=True)
class TextReader:
    """Extract the texts of a document.

    Args:
        keys: keys of JSON objects, or columns of tables; ``meta.text`` is the key "text" inside "meta".
        lists: whether a value may be a list of texts.
        lone_surrogates: "error" to reject them, or "replace" to substitute U+FFFD.
    """

    keys: Sequence[str]
    lists: bool = True
    lone_surrogates: str = ERROR

    def __call__(self, document: Values | bytes, is_json: bool) -> list[Text]:
        """Return the texts by key.

        Raises:
            UNREADABLE: the document cannot be read; :func:`describe_error` explains the error.
        """
        if isinstance(document, tuple):
            values = list(document)
        elif not is_json:
            return [self._valid(self._decoded(document))] * len(self.keys)
        else:
            values = self._values(document.removeprefix(BYTE_ORDER_MARK))
        return [self._text(key, value) for key, value in zip(self.keys, values, strict=True)]

    def _values(self, line: bytes) -> list[Any]:
        try:
            record = json.loads(self._decoded(line), parse_int=float)  # int() is limited to 4,300 digits
        except (ValueError, RecursionError):
            columns = json_columns(line, self.keys)
            if columns is None:
                raise
            return [column[0].as_py() for column in columns]
        if not isinstance(record, dict):
            raise TypeError("not a JSON object" + (ONE_LINE if isinstance(record, list) else ""))
        return [_value_at(record, key) for key in self.keys]

    def _decoded(self, document: bytes) -> str:
        return decode_text(document, self.lone_surrogates)

    def _text(self, key: str, value: Any) -> Text:
        if isinstance(value, list) and self.lists:
            return [self._one_text(key, text) for text in value]
        return self._one_text(key, value)

    def _one_text(self, key: str, value: Any) -> str:
        if isinstance(value, bytes):
            value = self._decoded(value)
        if not isinstance(value, str):
            raise TypeError(f"the value of {key!r} is not a string")
        return self._valid(value)

    def _valid(self, text: str) -> str:
        if text.isascii() or not SURROGATE.search(text):
            return text
        if self.lone_surrogates == REPLACE:
            return replace_surrogates(text)
        text.encode("utf-8")  # raises UnicodeEncodeError
        return text


def decode_text(document: bytes, lone_surrogates: str) -> str:
    """Decode UTF-8; surrogates are decoded if they are to be replaced.

    Raises:
        UnicodeDecodeError: the document is not UTF-8.
    """
    try:
        return document.decode("utf-8")
    except UnicodeDecodeError:
        if lone_surrogates == REPLACE:
            return document.decode("utf-8", "surrogatepass")
        raise


def replace_surrogates(text: str) -> str:
    """Return a text with U+FFFD for lone surrogates, and characters for pairs."""
    return SURROGATE.sub("\ufffd", text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"))


def _value_at(record: dict[str, Any], key: str) -> Any:
    """Return the value of a key, or of a dot-separated path of keys."""
    if key in record:
        return record[key]
    value: Any = record
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise KeyError(key)
        value = value[name]
    return value


def describe_error(error: Exception) -> str:
    """Return the reason why a document cannot be read."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})" + (ONE_LINE if error.doc.strip() in OPENINGS else "")
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "a lone surrogate, which is not valid text (--lone-surrogates replace)"
    if isinstance(error, KeyError):
        return f"the key {error} is missing (--json-keys)"
    if isinstance(error, OverflowError):
        return f"a token id outside the range of the corpus ({error})"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return str(error)


@dataclass
class BadDocuments:
    """Collect unreadable documents: messages for the first ones, and their count.

    Args:
        skip: skip them (``--on-error skip``) instead of stopping at the first.
    """

    skip: bool
    messages: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, chunk: InputChunk, line: int, reason: str, is_damage: bool = False) -> None:
        """Count an unreadable document or a damaged file.

        Raises:
            ConfigError: unless ``skip``.
        """
        self.count += 1
        message = describe_bad_document(chunk, line, reason)
        if not self.skip:
            raise stop_error(message, is_damage)
        if len(self.messages) < SHOWN_ERRORS:
            self.messages.append(message)


def describe_bad_document(chunk: InputChunk, line: int, reason: str) -> str:
    """Return the location of an unreadable document, followed by the reason."""
    place = f", row {line}" if chunk.input_format is InputFormat.TABLE else f":{line}"
    return f"{chunk.file}{place}: {reason}"


def stop_error(message: str, is_damage: bool) -> ConfigError:
    """Return the error that stops a job at an unreadable document or a damaged file."""
    return ConfigError(f"{message}. Fix the {'file' if is_damage else 'line'}, or skip errors with --on-error skip.")


def read_texts(
    files: Sequence[str], reader: TextReader, bad: BadDocuments, advance: Callable[[float], None] = lambda amount: None
) -> Iterator[tuple[InputChunk, int, list[Text]]]:
    """Yield (file, line or row, texts by key) of the documents of all files in order, in this process.

    Args:
        bad: collects the unreadable documents.
        advance: callback that receives the number of bytes read.

    Raises:
        ConfigError: a file cannot be read, a table lacks a column, or a document is unreadable and not skipped.
    """
    for name in files:
        chunk, line = InputChunk(name, detect_format(name)), 1
        for block in read_blocks(chunk, reader.keys):
            if block.damage:
                bad.add(chunk, line, f"the file is {block.damage}", is_damage=True)
                break
            content = block.load()
            for place, document in iter_documents(content, chunk.input_format, reader.keys):
                if isinstance(document, bytes) and is_blank(document):
                    continue
                try:
                    texts = reader(document, chunk.input_format is InputFormat.JSON)
                except UNREADABLE as error:
                    bad.add(chunk, line + place, describe_error(error))
                else:
                    yield chunk, line + place, texts
            line += block.lines(content)
            advance(block.read)
