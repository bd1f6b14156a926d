"""Corpora whose token ids are their positions, so that tests can identify tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_slm.corpus.index import HEADER, MAGIC


def write_numbered_corpus(prefix: Path, documents: list[list[int]], first: int = 0) -> str:
    """Write a corpus with token ids first, first + 1, ...; return its prefix.

    Args:
        documents: sequence lengths of each document.
        first: token id of the first token.
    """
    lengths = [length for document in documents for length in document]
    bounds = np.cumsum([0] + [len(document) for document in documents])
    np.arange(first, first + sum(lengths), dtype=np.int32).tofile(f"{prefix}.bin")
    pointers = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * 4
    parts: list[np.ndarray] = [np.array(lengths, np.int32), pointers, bounds.astype(np.int64)]
    header = HEADER.pack(MAGIC, 1, 4, len(lengths), len(bounds))
    Path(f"{prefix}.idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    return str(prefix)
