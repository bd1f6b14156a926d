"""Corpus metadata: tokenizer identity and counts of a corpus, in a JSON file next to ``.bin/.idx``.

The file name is ``NAME.corpus.json``. Earlier releases wrote ``NAME.json``, which might also be a user's raw text.
Metadata is therefore recognized by content, and a file of other content is never used, replaced or removed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_slm.runtime.files import check_replaceable, write_text

MAX_BYTES = 1 << 20  # larger files are not corpus metadata
IDENTITY = {"name": str, "fingerprint": str, "vocab_size": int}  # fields of "tokenizer" in every metadata file


def metadata_path(prefix: str | Path) -> Path:
    """Return the path of the metadata file of a corpus."""
    return Path(f"{prefix}.corpus.json")


def find_metadata(prefix: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the metadata file and metadata of a corpus, or None if there is none (Megatron-LM writes none)."""
    for path in (metadata_path(prefix), _former_path(prefix)):
        if (metadata := _parse(path)) is not None:
            return path, metadata
    return None


def read_metadata(prefix: str | Path) -> dict[str, Any] | None:
    """Return the metadata of a corpus, or None if there is none."""
    found = find_metadata(prefix)
    return None if found is None else found[1]


def write_metadata(prefix: str | Path, metadata: dict[str, Any]) -> None:
    """Write the metadata of a corpus atomically.

    Raises:
        ConfigError: the file cannot be written, or an existing file of that name is not corpus metadata.
    """
    path, text = metadata_path(prefix), json.dumps(metadata, indent=1) + "\n"
    write_text(path, text, "the corpus metadata", is_ours=is_metadata)


def remove_metadata(prefix: str | Path) -> None:
    """Remove the metadata of a corpus that is about to be replaced; files of other content are kept."""
    for path in (metadata_path(prefix), _former_path(prefix)):
        if is_metadata(path):
            path.unlink()


def check_metadata_writable(prefix: str | Path, flag: str) -> None:
    """Raise ConfigError if an existing file has the metadata file's name but is not corpus metadata."""
    if metadata_path(prefix).exists():
        check_replaceable(metadata_path(prefix), flag, is_ours=is_metadata)


def is_metadata(path: Path) -> bool:
    """Return whether a file contains corpus metadata."""
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
