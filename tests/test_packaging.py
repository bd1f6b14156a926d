"""Test that an installed package has every command and every data file."""

from __future__ import annotations

import tomllib
from pathlib import Path

from megatron_slm.cli.__main__ import command_names

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_command_has_a_console_script() -> None:
    assert {f"megatron-slm-{name}" for name in command_names()} <= set(PROJECT["project"]["scripts"])


def test_every_data_file_is_packaged() -> None:
    packaged = {
        path
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = (path for path in (ROOT / "megatron_slm").rglob("*") if path.is_file())
    present = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert not present - packaged
