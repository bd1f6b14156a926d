"""Corpus metadata: the identity of the tokenizer and the counts of a corpus, in a JSON file beside ``.bin/.idx``.

The file is ``NAME.corpus.json``. Earlier releases wrote ``NAME.json``, which may as well be a user's raw text: files
are recognised by their content, and a file that is not corpus metadata is neither used nor replaced nor removed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_slm.runtime.files import check_replaceable, write_text

MAX_BYTES = 1 << 20  # larger files are not ours, and are not read to find that out
IDENTITY = {"name": str, "fingerprint": str, "vocab_size": int}  # fields of "tokenizer" in every metadata file


def metadata_path(prefix: str | Path) -> Path:
    """Return the metadata file of a corpus, whether or not it exists."""
    return Path(f"{prefix}.corpus.json")


def find_metadata(prefix: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the metadata of a corpus and its file; None if there is none (Megatron-LM writes none)."""
    for path in (metadata_path(prefix), _former_path(prefix)):
        if (metadata := _parse(path)) is not None:
            return path, metadata
    return None


def read_metadata(prefix: str | Path) -> dict[str, Any] | None:
    """Return the metadata of a corpus; None if there is none."""
    found = find_metadata(prefix)
    return None if found is None else found[1]


def write_metadata(prefix: str | Path, metadata: dict[str, Any]) -> None:
    """Write the metadata of a corpus, atomically.

    Raises:
        ConfigError: the file cannot be written, or one under its name is not corpus metadata.
    """
    path, text = metadata_path(prefix), json.dumps(metadata, indent=1) + "\n"
    write_text(path, text, "the corpus metadata", is_ours=is_metadata)


def remove_metadata(prefix: str | Path) -> None:
    """Remove the metadata of a corpus that is about to be replaced; other files under these names are left."""
    for path in (metadata_path(prefix), _former_path(prefix)):
        if is_metadata(path):
            path.unlink()


def check_metadata_writable(prefix: str | Path, flag: str) -> None:
    """Raise ConfigError, before long work, if a file that is not corpus metadata has the name of the metadata."""
    if metadata_path(prefix).exists():
        check_replaceable(metadata_path(prefix), flag, is_ours=is_metadata)


def is_metadata(path: Path) -> bool:
    """Return whether a file holds corpus metadata."""
    return _parse(path) is not None


def _former_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def _parse(path: Path) -> dict[str, Any] | None:
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        metadata = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    tokenizer = metadata.get("tokenizer") if isinstance(metadata, dict) else None
    if not isinstance(tokenizer, dict):
        return None
    fits = all(type(tokenizer.get(name)) is kind for name, kind in IDENTITY.items())
    return metadata if fits else None
