"""Benchmark corpora from files of the installation: unique documents of natural text and Python source.

* natural: docstrings, README, METADATA, .rst, .md and .txt files of environments, and /usr/share/doc.
* source: Python source of standard libraries and site-packages.

If a benchmark needs more text, :func:`resample_documents` builds new documents from existing paragraphs. Repeated words
favor word caches, so measure unique text as well.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import inspect
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

SHORTEST = 200  # characters of a document
LONGEST_SOURCE = 1 << 20  # bytes; longer files are data tables
PROSE = {".md", ".rst", ".txt"}
PROSE_NAMES = {"METADATA", "PKG-INFO", "README", "NEWS", "CHANGES", "changelog.gz", "NEWS.gz", "README.gz"}


def natural_texts(roots: Sequence[Path]) -> Iterator[str]:
    """Yield prose below ``roots``, in path order."""
    parsed: set[bytes] = set()  # environments share files, and parsing is slow
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.suffix == ".py":
                for source in _read(path):
                    digest = hashlib.sha256(source.encode("utf-8")).digest()
                    if digest not in parsed:
                        parsed.add(digest)
                        yield from _docstrings(source)
            elif path.suffix in PROSE or path.name in PROSE_NAMES or path.name.endswith((".txt.gz", ".md.gz")):
                yield from _read(path)


def source_texts(roots: Sequence[Path]) -> Iterator[str]:
    """Yield the Python files below ``roots``, in path order."""
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            yield from _read(path)


def unique(texts: Iterable[str]) -> Iterator[str]:
    """Yield each sufficiently long text once."""
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if len(text) >= SHORTEST and digest not in seen:
            seen.add(digest)
            yield text


def resample_documents(texts: Sequence[str], size: int, seed: int = 1234) -> Iterator[str]:
    """Yield about ``size`` bytes of new documents with random paragraphs and the original paragraph counts."""
    rng = random.Random(seed)
    counts = [len(text.split("\n\n")) for text in texts]
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    written = 0
    while written < size:
        text = "\n\n".join(rng.choices(paragraphs, k=rng.choice(counts)))
        if len(text) >= SHORTEST:
            written += len(text.encode("utf-8"))
            yield text


def shuffled(texts: Iterable[str], seed: int = 1234) -> list[str]:
    """Return all texts in random order, so that sources are mixed as in a crawl."""
    texts = list(texts)
    random.Random(seed).shuffle(texts)
    return texts


def write_jsonl(path: Path, texts: Iterable[str], limit: int | None = None) -> tuple[int, int]:
    """Write ``{"text": ...}`` lines up to about ``limit`` bytes of text; return (documents, bytes of text)."""
    documents = size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            if limit is not None and size >= limit:
                break
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            documents += 1
            size += len(text.encode("utf-8"))
    return documents, size


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in third-party code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None and len(text) >= SHORTEST:
                yield inspect.cleandoc(text)


def _read(path: Path) -> Iterator[str]:
    try:
        if path.is_file() and path.stat().st_size <= LONGEST_SOURCE:
            content = path.read_bytes()
            yield (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError):
        return
