"""Two real corpora from what every installation has: clean mathematical prose, and a raw crawl of Python source.

* clean: the docstrings of sympy and mpmath; a tenth of the documents is held out.
* raw: Python source of the standard library and of site-packages, with half of the remaining clean text mixed in, so
  that raw holds some text worth learning among much that is not. sympy and mpmath themselves stay out of the crawl,
  or held-out docstrings would be in it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_slm.runtime.console import progress
from megatron_slm.runtime.files import atomic_path

CLEAN_PACKAGES = ("sympy", "mpmath")
SHORTEST, LONGEST = 200, 20_000  # characters of a document
RAW_CHARACTERS = 14_000_000  # of the crawl: more tokens than the longest run of the comparison reads
RAW_VALID_DOCUMENTS = 400
SEED = 1234


def build_corpora(folder: Path) -> None:
    """Write clean and raw, each for training and held out, as ``.jsonl`` below ``folder``."""
    chance = random.Random(SEED)
    clean = _shuffled(unique(docstrings(_source_files(_package_folders()))), chance)
    tenth = len(clean) // 10
    clean_valid, clean_train = clean[:tenth], clean[tenth:]
    raw = _shuffled(_limited(unique(source_texts(_crawled_files())), RAW_CHARACTERS), chance)
    raw_valid, raw_train = raw[:RAW_VALID_DOCUMENTS], raw[RAW_VALID_DOCUMENTS:]
    raw_train = _shuffled(raw_train + clean_train[: len(clean_train) // 2], chance)
    for name, texts in (
        ("clean_train", clean_train),
        ("clean_valid", clean_valid),
        ("raw_train", raw_train),
        ("raw_valid", raw_valid),
    ):
        _write(folder / f"{name}.jsonl", texts)


def docstrings(files: Iterable[Path]) -> Iterator[str]:
    """The docstrings of modules, classes and functions, with the indentation of code taken away."""
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text is not None and len(text) >= SHORTEST:
                    yield inspect.cleandoc(text)[:LONGEST]


def source_texts(files: Iterable[Path]) -> Iterator[str]:
    """Whole source files, long ones cut."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= SHORTEST:
            yield text[:LONGEST]


def unique(texts: Iterable[str]) -> Iterator[str]:
    """Each text once."""
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", errors="replace")).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def _package_folders() -> list[Path]:
    folders = []
    for name in CLEAN_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{name} is not installed; it comes with torch")
        folders.append(Path(spec.origin).parent)
    return folders


def _source_files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        with progress(f"reading {folder.name}", None, "files") as bar:
            for path in sorted(folder.rglob("*.py")):
                bar.advance()
                yield path


def _crawled_files() -> Iterator[Path]:
    """Python files of the standard library and site-packages in an order that mixes packages."""
    stdlib, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    # The interpreter's own site-packages lie below its standard library and may hold sympy and mpmath again.
    files = {path for path in stdlib.rglob("*.py") if "site-packages" not in path.parts}
    files |= set(packages.rglob("*.py"))
    kept = [path for path in files if not set(path.parts) & set(CLEAN_PACKAGES)]
    kept.sort(key=lambda path: hashlib.sha256(str(path.name).encode() + str(path.parent.name).encode()).digest())
    with progress("reading the crawl", None, "files") as bar:
        for path in kept:
            bar.advance()
            yield path


def _limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _shuffled(texts: Iterable[str], chance: random.Random) -> list[str]:
    drawn = list(texts)
    chance.shuffle(drawn)
    return drawn


def _write(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, "corpus") as temporary, temporary.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
