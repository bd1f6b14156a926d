"""Build corpora with Megatron-Core's builder, and run tools in this process."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_slm.corpus.index import HEADER, MAGIC

TOOLS = Path(__file__).parents[2] / "tools"
Documents = list[list[list[int]]]  # documents, each of sequences, each of ids


def build(prefix: Path, documents: Documents, dtype: Any = np.uint16, tokenizer: str | None = None) -> str:
    """Build a corpus with Megatron-Core's builder, with metadata if ``tokenizer`` is given; return its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        ids = list(itertools.chain.from_iterable(sequences))
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    if tokenizer is not None:
        identity = {"name": "SentencePieceTokenizer", "fingerprint": tokenizer, "vocab_size": 100}
        counts = {"documents": len(documents), "tokens": sum(len(s) for d in documents for s in d), "skipped": 1}
        Path(f"{prefix}.corpus.json").write_text(json.dumps({"tokenizer": identity, **counts, "append_eod": True}))
    return str(prefix)


def synthetic(prefix: Path, lengths: list[int], bounds: list[int], dtype: Any) -> str:
    """Write an index of any size over a sparse .bin file; return the prefix."""
    pointers = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))[:-1]]) * np.dtype(dtype).itemsize
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, DType.code_from_dtype(dtype), len(lengths), len(bounds)))
        for array, kind in ((lengths, np.int32), (pointers, np.int64), (bounds, np.int64)):
            file.write(np.array(array, kind).tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(sum(lengths) * np.dtype(dtype).itemsize)
    return str(prefix)


def run_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, arguments: list[str]
) -> tuple[Any, str, str]:
    """Run a tool, and return its exit code, standard output and standard error."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        code = importlib.import_module(name).main()
    except SystemExit as end:
        code = end.code
    output = capsys.readouterr()
    assert "Traceback" not in output.err and "usage:" not in output.err
    return code, output.out, output.err
