"""Links and file paths of the documentation: every one exists, and the file tree names every package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("megatron_slm", "tools", "benchmarks", "examples", "tests", "docs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target} is missing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_names_are_defined(page: Path) -> None:
    """A link whose text is a name in the code leads to the module that defines it."""
    for name, target in re.findall(r"\[`(\w+)`\]\(([^)#]+\.py)\)", page.read_text(encoding="utf-8")):
        source = (page.parent / target).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(class|def) {name}\b|^{name}\b", source, re.MULTILINE), f"{target} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_paths_exist(page: Path) -> None:
    for path in re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")):
        folder, slash, _ = path.partition("/")
        assert not slash or folder not in FOLDERS or (ROOT / path).exists(), f"{page.name}: {path} is missing"


def test_tests_that_the_contributing_guide_names_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert all(f"def {name}(" in sources for name in re.findall(r"`(test_\w+)`", page))


def test_identifiers_of_the_glossary_are_defined() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_slm").rglob("*.py"))
    defined = set(re.findall(r"^(?:class )?([A-Z]\w+)(?= = |\(|:)", sources, re.MULTILINE))
    assert not set(re.findall(r"`([A-Z][a-z]\w+)`", page)) - defined


def test_the_file_tree_names_every_package_and_no_missing_file() -> None:
    paths = set(tree_paths())
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in (ROOT / "megatron_slm").rglob("__init__.py")}
    assert not packages - paths
    assert not {path for path in paths if not (ROOT / path).exists()}


def tree_paths() -> Iterator[str]:
    """Yield the paths of the file tree in docs/architecture.md, from their indentation."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders: list[str] = []
    for line in page.partition("## File tree")[2].splitlines():
        if match := re.match(r"    ( *)([\w./]+)", line):
            folders = folders[: len(match[1]) // 2]
            yield "".join(folders) + match[2]
            folders.append(match[2])
