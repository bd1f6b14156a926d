"""The rooms of the package stand on floors: a room imports only what lies below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_slm"
FLOORS = ("mcore", "runtime", "config", "data", "objective", "model", "reference", "training", "pretrain", "torchrun")
WITHIN_DATA = ("tokenizers", "", "preprocessing", "scores")  # "": the files of the room itself; the last two apart
ALLOWED_ASIDE = {"analysis": {"runtime", "config"}, "objective": {"runtime"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    room = room_of(path)
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("megatron_slm.")} - {room}
    if room in FLOORS:
        allowed = ALLOWED_ASIDE.get(room, set(FLOORS[: FLOORS.index(room)]))
    else:
        allowed = ALLOWED_ASIDE.get(room, set())
    assert rooms <= allowed, f"{room} imports {rooms - allowed}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").rglob("*.py")), ids=lambda path: str(path.name))
def test_imports_within_data_run_downwards(path: Path) -> None:
    """Corpora and batches know no preprocessing and no sidecars, tokenizers know nothing else, and no circle."""
    names = [name.split(".") for name in imported(path) if name.startswith("megatron_slm.data.")]
    rooms = {parts[2] if len(parts) > 3 else "" for parts in names}
    own = path.parent.name if path.parent.name != "data" else ""
    allowed = set(WITHIN_DATA[: min(WITHIN_DATA.index(own), 2)]) | {own}
    assert rooms <= allowed, f"{own or 'data'} imports {rooms - allowed}"


def test_the_objective_knows_nothing_of_megatron() -> None:
    for path in (PACKAGE / "objective").rglob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] == "megatron"}, path


def test_only_runtime_reads_the_global_parallel_state() -> None:
    for path in FILES:
        reads = "megatron.core.parallel_state" in imported(path) or "parallel_state" in path.read_text(encoding="utf-8")
        assert room_of(path) == "runtime" or not reads, path


def test_config_parses_without_torch() -> None:
    for path in [*(PACKAGE / "config").glob("*.py"), PACKAGE / "runtime" / "errors.py", PACKAGE / "__init__.py"]:
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "megatron"}, path
