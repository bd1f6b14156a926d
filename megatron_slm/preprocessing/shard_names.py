"""Finds the shards of a corpus in a folder by their names, in order, and makes sure that none is missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.corpus.index import bin_path, partial_prefix
from megatron_slm.runtime.errors import ConfigError

NUMBERED = re.compile(r"(\d+)-of-(\d+)")  # the place of a shard in its name


def find_shards(folder: str, output_prefix: str) -> list[str]:
    """The prefixes of all corpora in a folder, sorted by name with numbers counted (shard 10 behind shard 9).

    Where names hold NUMBER-of-TOTAL, all of them must be there, of one corpus, and nothing else but the output.

    Raises:
        ConfigError: no corpus, half a corpus, one that is being written, or a gap in the numbers.
    """
    place, output = Path(folder), bin_path(output_prefix).resolve()
    if not place.is_dir():
        raise ConfigError(f"--input {folder}: there is no such folder. Give prefixes with --input-prefixes.")
    names = {path.name[:-4] for path in place.iterdir() if path.suffix in (".bin", ".idx") and path.is_file()}
    names.discard(Path(partial_prefix(output_prefix)).name)  # a merge that was killed; it is written anew
    for name in sorted(names):
        if name.endswith(partial_prefix("")):
            raise ConfigError(
                f"--input {folder}: {name} is being written, or was left by a job that was killed. Let the job end "
                "(--resume), or remove the file."
            )
    shards = sorted((str(place / name) for name in names), key=_natural)
    if any(NUMBERED.search(Path(shard).name) for shard in shards):
        shards = [shard for shard in shards if bin_path(shard).resolve() != output]  # of a merge done before
        _check_numbers(folder, [Path(shard).name for shard in shards])
    if not shards:
        raise ConfigError(f"--input {folder}: the folder holds no corpus (.bin and .idx).")
    return shards


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _check_numbers(folder: str, names: Sequence[str]) -> None:
    groups: dict[str, set[int]] = {}
    total = 0
    for name in names:
        match = NUMBERED.search(name)
        if match is None:
            raise ConfigError(
                f"--input {folder} holds numbered shards, and {name} besides. Name what belongs together with "
                "--input-prefixes."
            )
        total = int(match[2])
        groups.setdefault(f"{name[: match.start()]}#-of-{match[2]}{name[match.end() :]}", set()).add(int(match[1]))
    if len(groups) > 1:
        raise ConfigError(
            f"--input {folder} holds shards of {len(groups)} corpora: {', '.join(sorted(groups))}. Name those of one "
            "with --input-prefixes."
        )
    for pattern, found in groups.items():
        first = 1 if total in found else 0  # shards are counted from 0, or from 1
        if missing := sorted(set(range(first, first + total)) - found):
            raise ConfigError(
                f"--input {folder}: {len(missing)} of {total} shards are missing: {pattern}, # = "
                f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}. Make them first."
            )
