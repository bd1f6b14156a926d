"""Corpora of single studies, from those of the quickstart.

* general: three domains, as in the paper's general mix (section 3.1). Text is docstrings of three quarters of the
  crawl, code the source of the other files, and mathematics the clean corpus. Held-out documents are in none.
* documents: those documents of a part of the raw corpus that have the highest mean excess loss, by score sidecars of
  the base and the reference model.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import stages
from corpora import SHORTEST, unique
from numpy.typing import NDArray
from studies import BASE, POOL, REFERENCE, SELECTED

from megatron_slm.corpus.index import read_index
from megatron_slm.runtime.files import atomic_path
from megatron_slm.scores.sidecar import Sidecar, partial_path, read_header, sidecar_path

DOMAINS = ("general_text", "general_code")
POOL_SHARE = 6  # one of this many documents of the raw corpus is scored
CODE_SHARE = 4  # one of this many source files is code; the others give docstrings
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)  # also of sources that were cut, which do not parse


def prepare(directory: Path, names: Iterable[str], ratio: float) -> None:
    """Prepare the corpora of ``names`` that are not the quickstart's.

    Args:
        directory: of the runs.
        names: corpora of variants.
        ratio: share of the tokens of documents to select.
    """
    wanted, data = set(names), directory / "data"
    source, mark = Path(__file__).read_text(encoding="utf-8"), partial(stages.mark, directory=data)

    def tokenize(names: Sequence[str], texts: str) -> None:
        stages.tokenize(data, stages.tokenizer_flags(directory), names, [mark(texts), mark("tokenizer")])

    if wanted & set(DOMAINS):
        stages.stage("domains", data, [source], lambda: build_domains(data), [mark("corpora")])
        tokenize(DOMAINS, "domains")
    if SELECTED in wanted:
        stages.stage("pool", data, [source], lambda: build_pool(data), [mark("corpora")])
        tokenize([POOL], "pool")
        scores = [score(directory, name) for name in (BASE, REFERENCE)]
        inputs = [mark(f"score {name}") for name in scores]
        settings = [source, str(ratio), *scores]
        stages.stage("documents", data, settings, lambda: build_selected(directory, scores, ratio), inputs)
        tokenize([SELECTED], "documents")


def build_domains(data: Path) -> None:
    """Write the corpora of text and code."""
    clean = set(read_texts(data, "clean_train"))
    sources = [text for text in read_texts(data, "raw_train") if text not in clean]
    code = sources[::CODE_SHARE]
    documented = (text for number, text in enumerate(sources) if number % CODE_SHARE)
    docstrings = (inspect.cleandoc(found) for text in documented for found in DOCSTRING.findall(text))
    write_texts(data, "general_text", unique(text for text in docstrings if len(text) >= SHORTEST))
    write_texts(data, "general_code", code)


def build_pool(data: Path) -> None:
    """Write the part of the raw corpus from which documents are selected."""
    write_texts(data, POOL, read_texts(data, "raw_train")[::POOL_SHARE])


def score(directory: Path, model: str) -> str:
    """Score the pool with a model, and return the name of the sidecar."""
    command = [sys.executable, "tools/score_corpus.py", "--reference-load", str(directory / model)]
    command += ["--data-path", stages.corpus(directory, POOL), "--reference-scores", model]

    def work() -> None:
        sidecar = sidecar_path(stages.corpus(directory, POOL), model)
        for path in (sidecar, partial_path(sidecar)):  # of a former model
            path.unlink(missing_ok=True)
        stages.run(command)

    inputs = stages.training_inputs(directory, [POOL], [model])
    stages.stage(f"score {model}", directory / "data", command, work, inputs)
    return model


def build_selected(directory: Path, scores: Sequence[str], ratio: float) -> None:
    """Write the documents of the pool with the highest mean excess loss.

    Args:
        directory: of the runs.
        scores: names of the sidecars of the base and the reference model.
        ratio: share of the tokens to select.
    """
    prefix = stages.corpus(directory, POOL)
    lengths = np.array(read_index(prefix).lengths, np.int64)
    base, reference = (losses(prefix, name, int(lengths.sum())) for name in scores)
    texts = read_texts(directory / "data", POOL)
    if len(texts) != len(lengths):
        raise ValueError(f"{prefix} has {len(lengths)} documents, but {POOL}.jsonl {len(texts)}: tokenize it again.")
    chosen = select_documents(base - reference, lengths, ratio)
    write_texts(directory / "data", SELECTED, [texts[number] for number in chosen])


def losses(prefix: str, name: str, tokens: int) -> NDArray[np.float32]:
    """Return all losses of a sidecar."""
    path = sidecar_path(prefix, name)
    return Sidecar(path, read_header(path)).losses(0, tokens)


def select_documents(excess: NDArray[np.float32], lengths: NDArray[np.int64], ratio: float) -> list[int]:
    """Return the numbers of the documents with the highest mean excess loss, up to ``ratio`` of the tokens.

    Args:
        excess: of all tokens, [tokens].
        lengths: tokens of each document, [documents], all positive.
        ratio: share of the tokens.
    """
    sums = np.add.reduceat(excess, np.cumsum(lengths) - lengths, dtype=np.float64)
    order = np.argsort(-sums / lengths, kind="stable")
    fits = np.cumsum(lengths[order]) <= ratio * lengths.sum()
    return sorted(order[fits].tolist())


def read_texts(data: Path, name: str) -> list[str]:
    with (data / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def write_texts(data: Path, name: str, texts: Iterable[str]) -> None:
    with atomic_path(data / f"{name}.jsonl", "corpus") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
