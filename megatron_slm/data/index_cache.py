"""Cache of index arrays. A hit requires complete, unmodified files that were built from the same data.

An entry consists of one ``.npy`` file per array and a JSON file, written last, with the description of the data and the
quick fingerprints of the arrays. Files are written atomically, so that a killed run leaves no partial file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.corpus.fingerprints import quick_fingerprint
from megatron_slm.runtime.collective import is_first_rank
from megatron_slm.runtime.console import warn
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import atomic_path, check_regular, explained_write, write_text

FLAG = "--data-cache-path"
Arrays = tuple[np.ndarray, ...]


def cached_arrays(
    directory: str | None, key: str, description: str, names: Sequence[str], build: Callable[[], Arrays]
) -> Arrays:
    """Return the memory-mapped arrays of an entry, building them (and writing them on rank 0) on a miss.

    If they cannot be written, a warning is issued, and every rank keeps the arrays in memory.

    Args:
        directory: cache directory; None keeps the arrays in memory.
        key: prefix of the file names.
        description: description of the data that determines the arrays.
        names: names of the arrays.
        build: function that builds the arrays.
    """
    if directory is None:
        return build()
    base = Path(directory) / key
    found = _read(base, description, names)
    if found is not None:
        return found
    arrays = build()
    if not is_first_rank():
        return arrays
    try:
        _write(base, description, dict(zip(names, arrays, strict=True)))
    except ConfigError as error:
        _warn_once(f"{error} Until then every rank builds the sample indices in memory.")
        return arrays
    return _read(base, description, names) or arrays


@cache
def _warn_once(text: str) -> None:
    """Issue a warning once, although several datasets may share an unwritable directory."""
    warn(text)


def _read(base: Path, description: str, names: Sequence[str]) -> Arrays | None:
    try:
        paths = [_array_path(base, name) for name in names]
        for path in (_entry_path(base), *paths):
            check_regular(path)
        entry: dict[str, Any] = json.loads(_entry_path(base).read_bytes())
        if entry["description"] != description:
            return None
        if [quick_fingerprint(path) for path in paths] != [entry["arrays"][name] for name in names]:
            return None
        return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(base: Path, description: str, arrays: dict[str, np.ndarray]) -> None:
    flag = f"{FLAG} (sample indices)"
    with explained_write(base.parent, flag):
        base.parent.mkdir(parents=True, exist_ok=True)
    fingerprints = {}
    for name, array in arrays.items():
        with atomic_path(_array_path(base, name), flag) as temporary:
            np.save(temporary, array, allow_pickle=False)
        fingerprints[name] = quick_fingerprint(_array_path(base, name))
    entry = {"description": description, "arrays": fingerprints}
    write_text(_entry_path(base), json.dumps(entry, indent=1) + "\n", flag)


def _entry_path(base: Path) -> Path:
    return base.with_name(f"{base.name}-entry.json")


def _array_path(base: Path, name: str) -> Path:
    return base.with_name(f"{base.name}-{name}.npy")
