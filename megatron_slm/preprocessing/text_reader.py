"""The texts of documents: values of JSON lines and table rows, and the reasons why some cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_slm.preprocessing.arrow_columns import json_columns
from megatron_slm.preprocessing.documents import Part, Values, blocks_of, documents_in, is_blank
from megatron_slm.preprocessing.inputs import BYTE_ORDER_MARK, Form, form_of
from megatron_slm.runtime.errors import ConfigError

ERROR, REPLACE = "error", "replace"  # --lone-surrogates
SURROGATE = re.compile("[\ud800-\udfff]")
UNREADABLE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # of one document
SHOWN_ERRORS = 5
OPENINGS = ("{", "[", "[{")  # of JSON that takes several lines
ONE_LINE = (
    "; each line must be one object, which jq makes of a list (jq -c '.[]' FILE) or of longer objects (jq -c . FILE)"
)
Text = str | list[str]  # one sequence, or one for each text of a JSON list


@dataclass(frozen=True)
class TextReader:
    """Reads the texts of a document.

    Args:
        keys: keys of JSON objects, or columns of tables; ``meta.text`` is the entry "text" of the object "meta".
        lists: whether a value may be a list of texts.
        lone_surrogates: "error", or "replace" each by U+FFFD.
    """

    keys: Sequence[str]
    lists: bool = True
    lone_surrogates: str = ERROR

    def __call__(self, document: Values | bytes, is_json: bool) -> list[Text]:
        """Return the texts by key. Raises one of UNREADABLE, which :func:`reason_of` explains."""
        if isinstance(document, tuple):
            values = list(document)
        elif not is_json:
            return [self._valid(self._decoded(document))] * len(self.keys)
        else:
            values = self._values(document.removeprefix(BYTE_ORDER_MARK))
        return [self._text(key, value) for key, value in zip(self.keys, values, strict=True)]

    def _values(self, line: bytes) -> list[Any]:
        try:
            record = json.loads(self._decoded(line), parse_int=float)  # an int has at most 4,300 digits
        except (ValueError, RecursionError):
            columns = json_columns(line, self.keys)
            if columns is None:
                raise
            return [column[0].as_py() for column in columns]
        if not isinstance(record, dict):
            raise TypeError("not a JSON object" + (ONE_LINE if isinstance(record, list) else ""))
        return [_value_at(record, key) for key in self.keys]

    def _decoded(self, document: bytes) -> str:
        try:
            return document.decode("utf-8")
        except UnicodeDecodeError:
            if self.lone_surrogates == REPLACE:
                return document.decode("utf-8", "surrogatepass")
            raise

    def _text(self, key: str, value: Any) -> Text:
        if isinstance(value, list) and self.lists:
            return [self._one_text(key, text) for text in value]
        return self._one_text(key, value)

    def _one_text(self, key: str, value: Any) -> str:
        if isinstance(value, bytes):
            value = self._decoded(value)
        if not isinstance(value, str):
            raise TypeError(f"the value of {key!r} is not a text")
        return self._valid(value)

    def _valid(self, text: str) -> str:
        if text.isascii() or not SURROGATE.search(text):
            return text
        if self.lone_surrogates == REPLACE:
            return SURROGATE.sub("\ufffd", text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"))
        text.encode("utf-8")  # raises UnicodeEncodeError
        return text


def _value_at(record: dict[str, Any], key: str) -> Any:
    """Return the value of a key, or of a path of keys joined by dots."""
    if key in record:
        return record[key]
    value: Any = record
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise KeyError(key)
        value = value[name]
    return value


def reason_of(error: Exception) -> str:
    """Return in words why a document cannot be read."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})" + (ONE_LINE if error.doc.strip() in OPENINGS else "")
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair, which is no text (--lone-surrogates replace)"
    if isinstance(error, KeyError):
        return f"the key {error} is missing (--json-keys)"
    if isinstance(error, OverflowError):
        return f"a token id that the corpus cannot hold ({error})"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply"
    return str(error)


@dataclass
class BadDocuments:
    """Documents that cannot be read: a message for the first ones, and their count.

    Args:
        skip: go on without them (``--on-error skip``), or stop at the first.
    """

    skip: bool
    messages: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, part: Part, line: int, reason: str, is_damage: bool = False) -> None:
        """Count a document, or a damaged file.

        Raises:
            ConfigError: unless ``skip``.
        """
        self.count += 1
        message = bad_document(part, line, reason)
        if not self.skip:
            raise stop_at(message, is_damage)
        if len(self.messages) < SHOWN_ERRORS:
            self.messages.append(message)


def bad_document(part: Part, line: int, reason: str) -> str:
    """Return the place of a document, with the reason why it cannot be read."""
    place = f", row {line}" if part.form is Form.TABLE else f":{line}"
    return f"{part.file}{place}: {reason}"


def stop_at(message: str, is_damage: bool) -> ConfigError:
    """Return the error that stops a job at a document, or at a damaged file."""
    mend = "Mend the file" if is_damage else "Mend the line"
    return ConfigError(f"{message}. {mend}, or go on without what cannot be read: --on-error skip.")


def read_texts(
    files: Sequence[str], reader: TextReader, bad: BadDocuments, advance: Callable[[float], None] = lambda amount: None
) -> Iterator[tuple[Part, int, list[Text]]]:
    """Yield (file, line or row, texts by key) of the documents of all files in order, in this process.

    Args:
        bad: counts the documents that cannot be read.
        advance: is called with the bytes of the files that were read.

    Raises:
        ConfigError: a file that cannot be read, a table without the columns, or a bad document, unless they are
            skipped.
    """
    for name in files:
        part, line = Part(name, form_of(name)), 1
        for block in blocks_of(part, reader.keys):
            if block.damage:
                bad.add(part, line, f"the file is {block.damage}", is_damage=True)
                break
            content = block.load()
            for place, document in documents_in(content, part.form, reader.keys):
                if isinstance(document, bytes) and is_blank(document):
                    continue
                try:
                    texts = reader(document, part.form is Form.JSON)
                except UNREADABLE as error:
                    bad.add(part, line + place, reason_of(error))
                else:
                    yield part, line + place, texts
            line += block.lines(content)
            advance(block.read)
