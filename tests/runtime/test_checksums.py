"""Checksums of files that several ranks read together."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_slm.runtime import checksums
from megatron_slm.runtime.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 16)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    return path


def contribution(path: Path, rank: int, readers: list[int]) -> Any:
    """Return the object that a rank sends to rank 0."""
    sent: list[Any] = []

    def gather(value: Any) -> list[Any]:
        sent.append(value)
        return [value]

    every_rank = [[path.stat().st_size]] * (max(readers) + 1)
    with (
        mock.patch.multiple(
            checksums,
            gather_on_first_rank=gather,
            on_every_rank=lambda function: function(),
            gather_on_every_rank=lambda sizes: every_rank,
            ranks_with_same_files=lambda directories, role: readers,
            on_first_rank=lambda function: {rank: [] for rank in readers},
        ),
        mock.patch.multiple(
            checksums.dist, is_initialized=lambda: True, get_rank=lambda: rank, get_world_size=lambda: 4
        ),
    ):
        checksums.file_checksums([path], "--load")
    return sent[0]


def test_ranks_share_the_blocks_and_send_their_list_once(file: Path) -> None:
    gathered = [contribution(file, rank, [0, 1, 2]) for rank in range(3)]
    assert [len(blocks) for _, blocks, _ in gathered] == [7, 0, 0]  # not once per rank
    assert sorted(block for _, _, found in gathered for block in found) == [(0, offset) for offset in range(0, 100, 16)]
    assert checksums._combine([file], gathered, "--load") == {0: [checksums.local_checksum(file, "--load")]}


def test_hosts_with_separate_copies_have_separate_checksums(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(b"damaged")
    gathered = [contribution(file, 0, [0, 1]), contribution(file, 1, [0, 1]), contribution(copy, 2, [2])]
    combined = checksums._combine([file], gathered, "--load")
    assert combined[0] == [checksums.local_checksum(file, "--load")]
    assert combined[2] == [checksums.local_checksum(copy, "--load")]


def test_a_read_error_is_reported(file: Path) -> None:
    first, blocks, found = contribution(file, 0, [0])
    damaged = dict.fromkeys(found, "Input/output error")
    with pytest.raises(ConfigError, match="Input/output error"):
        checksums._combine([file], [(first, blocks, damaged)], "--load")
