"""Test README and docs: every bash block runs in order in one directory with small settings."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_slm.testing.programs import program_server
from megatron_slm.testing.published import save_model

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMES = ("generation", "analysis", "reference_scores", "finetuning", "data", "performance", "scaling")
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]
BLOCKS = [
    (page, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S))
]


def write_text(path: Path, seed: int) -> None:
    """Return JSON lines of a user's corpus."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    lines = (json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(400))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a user's directory: a checkout, raw and clean text, a published model, and wrappers of long commands."""
    directory = tmp_path_factory.mktemp("reader")
    for name in ("tools", "examples", "megatron_slm", "Makefile"):
        (directory / name).symlink_to(ROOT / name)
    for seed, name in enumerate(("raw", "clean")):
        write_text(directory / f"{name}.jsonl", seed)
    save_model("llama", directory / "models" / "TinyLlama-1.1B", intermediate_size=64)
    (directory / "bin").mkdir()
    for program in ("python", "torchrun", "make"):
        stand_in = directory / "bin" / program
        stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{HERE / "small_settings.py"}" {program} "$@"\n')
        stand_in.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Run commands without the imports of each, which take most of their time; tests of launchers start real ones."""
    with program_server() as address:
        yield address


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=lambda value: str(value).strip()[:40])
def test_documented_block_runs(workspace: Path, server: str, page: str, number: int, block: str) -> None:
    env = os.environ | {"PATH": f"{workspace / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT), "PROGRAM_SERVER": server}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=workspace, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{page}, block {number}:\n{block}\n{result.stdout}\n{result.stderr}"


def test_every_page_with_commands_is_tested() -> None:
    shown = {
        str(path.relative_to(ROOT))
        for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        if "```bash" in path.read_text(encoding="utf-8")
    }
    assert shown == set(PAGES)
