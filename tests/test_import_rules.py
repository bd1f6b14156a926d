"""Import rules: a package imports only packages below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_slm"
PACKAGES = (  # from the lowest to the highest
    *("mcore", "runtime", "config", "tokenizers", "corpus", "preprocessing", "data", "scores", "objective", "model"),
    *(
        "checkpoint",
        "reference",
        "inference",
        "evaluation",
        "finetune",
        "training",
        "planning",
        "analysis",
        "cli",
        "launch",
        "testing",
        "pretrain",
        "torchrun",
    ),
)
RESTRICTED = {
    "objective": {"runtime"},
    "analysis": {"runtime", "config"},
    "preprocessing": {"runtime", "config", "tokenizers", "corpus"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    package = package_of(path)
    packages = {name.split(".")[1] for name in imported(path) if name.startswith("megatron_slm.")} - {package}
    if package == "__init__":
        assert not packages
        return
    allowed = RESTRICTED.get(package, set(PACKAGES[: PACKAGES.index(package)]))
    assert packages <= allowed, f"{package} imports {packages - allowed}"


def test_every_package_has_a_layer() -> None:
    assert {package_of(path) for path in FILES} == {*PACKAGES, "__init__"}


def test_the_model_reads_no_data() -> None:
    for path in FILES:
        if package_of(path) == "model":
            assert not {name for name in imported(path) if name.startswith("megatron_slm.data")}, path


def test_the_objective_imports_no_megatron() -> None:
    for path in (PACKAGE / "objective").rglob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] == "megatron"}, path


def test_only_runtime_reads_the_global_parallel_state() -> None:
    for path in FILES:
        reads = "megatron.core.parallel_state" in imported(path) or "parallel_state" in path.read_text(encoding="utf-8")
        assert package_of(path) == "runtime" or not reads, path


def test_config_parses_without_torch() -> None:
    for path in [*(PACKAGE / "config").rglob("*.py"), PACKAGE / "runtime" / "errors.py", PACKAGE / "__init__.py"]:
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "megatron"}, path
