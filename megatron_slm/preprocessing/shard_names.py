"""Discovery of the corpus shards in a directory: order by name, and detection of missing shards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.corpus.index import bin_path, partial_prefix
from megatron_slm.runtime.errors import ConfigError

NUMBERED = re.compile(r"(\d+)-of-(\d+)")  # shard number and count in a file name


def find_shards(directory: str, output_prefix: str) -> list[str]:
    """Return the prefixes of all corpora in a directory in natural order (shard 10 after shard 9).

    If names contain NUMBER-of-TOTAL, the shards must be complete and belong to one corpus, and the output is the only
    other corpus allowed in the directory.

    Raises:
        ConfigError: there is no corpus, a corpus is being written, or a shard is missing.
    """
    output = bin_path(output_prefix).resolve()
    if not Path(directory).is_dir():
        raise ConfigError(f"--input {directory}: no such directory. Name corpora with --input-prefixes.")
    files = [path for path in Path(directory).iterdir() if path.suffix in (".bin", ".idx") and path.is_file()]
    names = {path.name[:-4] for path in files}
    names.discard(Path(partial_prefix(output_prefix)).name)  # left by a killed merge, and rewritten
    for name in sorted(names):
        if name.endswith(partial_prefix("")):
            raise ConfigError(
                f"--input {directory}: {name} is being written, or was left by a killed job. Finish the job "
                "(--resume), or remove the file."
            )
    shards = sorted((str(Path(directory) / name) for name in names), key=_natural_order)
    if any(NUMBERED.search(Path(shard).name) for shard in shards):
        shards = [shard for shard in shards if bin_path(shard).resolve() != output]  # written by an earlier merge
        _check_numbers(directory, [Path(shard).name for shard in shards])
    if not shards:
        raise ConfigError(f"--input {directory}: the directory contains no corpus (.bin and .idx).")
    return shards


def _natural_order(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _check_numbers(directory: str, names: Sequence[str]) -> None:
    groups: dict[str, set[int]] = {}
    total = 0
    for name in names:
        match = NUMBERED.search(name)
        if match is None:
            raise ConfigError(
                f"--input {directory} contains numbered shards, but also {name}. Name the shards of one corpus with "
                "--input-prefixes."
            )
        total = int(match[2])
        groups.setdefault(f"{name[: match.start()]}#-of-{match[2]}{name[match.end() :]}", set()).add(int(match[1]))
    if len(groups) > 1:
        raise ConfigError(
            f"--input {directory} contains shards of {len(groups)} corpora: {', '.join(sorted(groups))}. Name those of "
            "one corpus with --input-prefixes."
        )
    for pattern, found in groups.items():
        first = 1 if total in found else 0  # shards are numbered from 0 or from 1
        if missing := sorted(set(range(first, first + total)) - found):
            raise ConfigError(
                f"--input {directory}: {len(missing)} of {total} shards are missing: {pattern}, # = "
                f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}. Create them first."
            )
