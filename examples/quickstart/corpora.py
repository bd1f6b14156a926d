"""Build two corpora from installed packages: clean mathematical prose, and a raw crawl of Python source.

* clean: docstrings of sympy and mpmath; 10 % of the documents are held out.
* raw: Python source of the standard library and site-packages, mixed with half of the remaining clean text, so that a
  minority of raw is relevant. sympy and mpmath are excluded from the crawl, since it would contain held-out docstrings.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from megatron_slm.runtime.console import progress
from megatron_slm.runtime.files import atomic_path

CLEAN_PACKAGES = ("sympy", "mpmath")
SHORTEST, LONGEST = 200, 20_000  # characters of a document
RAW_CHARACTERS = 14_000_000  # size of the crawl, which exceeds the longest run of the comparison
RAW_VALID_DOCUMENTS = 400
SEED = 1234


def build_corpora(directory: Path) -> None:
    """Write the training and held-out sets of clean and raw as ``.jsonl`` files to ``directory``."""
    rng = random.Random(SEED)
    clean = _shuffled(unique(docstrings(_source_files(_package_directories()))), rng)
    tenth = len(clean) // 10
    clean_valid, clean_train = clean[:tenth], clean[tenth:]
    raw = _shuffled(_limited(unique(source_texts(_crawled_files())), RAW_CHARACTERS), rng)
    raw_valid, raw_train = raw[:RAW_VALID_DOCUMENTS], raw[RAW_VALID_DOCUMENTS:]
    raw_train = _shuffled(raw_train + clean_train[: len(clean_train) // 2], rng)
    for name, texts in (
        ("clean_train", clean_train),
        ("clean_valid", clean_valid),
        ("raw_train", raw_train),
        ("raw_valid", raw_valid),
    ):
        _write(directory / f"{name}.jsonl", texts)


def docstrings(files: Iterable[Path]) -> Iterator[str]:
    """Yield the dedented docstrings of modules, classes and functions."""
    paths = list(files)
    with ProcessPoolExecutor(2) as pool, progress("reading docstrings", len(paths), "files") as bar:
        for texts in pool.map(_docstrings_of, paths, chunksize=16):  # in parallel, since parsing takes most of the time
            bar.advance()
            yield from texts


def _docstrings_of(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    definitions = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, definitions)]
    return [inspect.cleandoc(text)[:LONGEST] for text in texts if text is not None and len(text) >= SHORTEST]


def source_texts(files: Iterable[Path]) -> Iterator[str]:
    """Yield source files, truncated to LONGEST characters."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= SHORTEST:
            yield text[:LONGEST]


def unique(texts: Iterable[str]) -> Iterator[str]:
    """Yield each text once."""
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", errors="replace")).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def _package_directories() -> list[Path]:
    directories = []
    for name in CLEAN_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{name} is not installed; it comes with torch")
        directories.append(Path(spec.origin).parent)
    return directories


def _source_files(directories: Iterable[Path]) -> Iterator[Path]:
    for directory in directories:
        yield from sorted(directory.rglob("*.py"))


def _crawled_files() -> Iterator[Path]:
    """Yield Python files of the standard library and site-packages in an order that mixes packages."""
    stdlib, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    # The interpreter's site-packages are inside of its standard library, and may contain sympy and mpmath.
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


def _shuffled(texts: Iterable[str], rng: random.Random) -> list[str]:
    shuffled = list(texts)
    rng.shuffle(shuffled)
    return shuffled


def _write(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, "corpus") as temporary, temporary.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
