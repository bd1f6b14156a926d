"""Checkpoints that Megatron-LM wrote.

The archives were recorded by fixtures/megatron_lm_checkpoints/record.py with three versions of Megatron-LM.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

ARCHIVES = Path(__file__).parents[2] / "fixtures" / "megatron_lm_checkpoints"


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("megatron_lm")
    for path in ARCHIVES.glob("*.tar.xz"):
        with tarfile.open(path) as archive:
            archive.extractall(directory, filter="data")
    return directory
