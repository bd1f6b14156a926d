"""Test that the files and flags in commands of README and docs exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from megatron_slm.testing.programs import run_program
from megatron_slm.testing.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = {"--nproc-per-node", "--nnodes", "--standalone", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun's


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of every project command in the bash blocks of a page."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if any(word.startswith(("tools/", "examples/")) or word == "megatron_slm.pretrain" for word in words):
                found.append(words)
    return found


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@cache
def help_of(program: str, *positional: str) -> str:
    """Return the help text of a program, or of its command that ``positional`` names."""
    command = ["-m", program] if program == "megatron_slm.pretrain" else [str(ROOT / program), *positional]
    [text] = run_ranks(_output, 1, [*command, "--help"], initialize=False)
    return text


def _output(rank: int, world_size: int, arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as end:
        run_program(arguments)
    assert not end.value.code
    return output.getvalue()


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)[:60]
)
def test_shown_command_has_its_files_and_flags(page: Path, words: list[str]) -> None:
    place = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "megatron_slm.pretrain")
    positional = [word for word in words[place + 1 : place + 2] if not word.startswith("-")]
    known = set(re.findall(r"--[\w-]+", help_of(words[place], *positional)))
    for number, word in enumerate(words):
        if word.startswith("--"):
            flag = word.partition("=")[0]
            assert flag in (LAUNCHERS if number < place else known), f"{page.name}: {words[place]} has no {flag}"
        elif word.startswith(("tools/", "examples/")):
            assert (ROOT / word).exists(), f"{page.name}: {word} is missing"


def test_every_tool_is_documented() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for tool in (ROOT / "tools").glob("*.py"):
        assert f"tools/{tool.name}" in text, f"no page shows tools/{tool.name}"


def test_documented_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"`make (\w+)`", page.read_text(encoding="utf-8")):
            assert f"\n{target}:" in makefile, f"{page.name}: make {target}"
