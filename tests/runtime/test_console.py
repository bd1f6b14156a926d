"""Output on narrow terminals, in files, in ASCII, and on a full disk."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from megatron_slm.runtime import console
from megatron_slm.runtime.console import BYTES, format_rate, make_console, progress

SCRIPT = """
from megatron_slm.runtime.console import make_console, progress, warn
console = make_console()
for number in range(3000):
    console.print(f"step {number} τ +1.00 − 日本")
warn("τ")
with progress("reading", 10, "B") as bar:
    bar.advance(10)
console.print("done τ")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("console") / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return f"{sys.executable} {path}"


def run(command: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["bash", "-c", command], env=os.environ | env, capture_output=True, timeout=60)


def test_a_terminal_without_a_size_gets_lines(script: str) -> None:
    assert run(script, COLUMNS="0").stdout.decode().endswith("done τ\n")


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_ascii(script: str, env: dict[str, str]) -> None:
    ended = run(script, **env)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(b"step 0 tau +1.00 - ??\n") and ended.stdout.endswith(b"done tau\n")
    assert ended.stderr == b"warning: tau\n"


@pytest.mark.parametrize("redirected", [">/dev/full", ">/dev/full 2>&1", "| head -1"])
def test_a_log_that_cannot_be_written_does_not_end_the_run(script: str, redirected: str) -> None:
    ended = run(f"{script} {redirected}; exit ${{PIPESTATUS[0]}}")
    assert (ended.returncode, b"Traceback" in ended.stderr) == (0, False), ended.stderr


PRINTS = """
import sys
from megatron_slm.runtime import reporting
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.output import print_result, print_summary

def action():
    print_summary("done") if sys.argv[1] == "summary" else print_result("result\\n")
    if sys.argv[2:]:
        raise ConfigError("wrong")

sys.exit(getattr(reporting, "run_tool" if sys.argv[1] == "summary" else "run_command")(action))
"""
FULL = "standard output cannot be written (No space left on device)"


@pytest.mark.parametrize(
    ("redirected", "code", "errors"),
    [
        ("summary >/dev/full", 0, f"warning: {FULL}; its lines are lost.\n"),
        ("summary | true", 0, ""),
        ("result | true", 0, ""),
        ("result >/dev/full", 2, f"error: {FULL}. Write it elsewhere.\n"),
        ("summary wrong 2>/dev/full", 2, ""),
        ("result wrong 2>/dev/full", 2, ""),
        ("summary <&- >&- 2>&-", 0, ""),
        ("result wrong >&-", 2, "error: wrong\n"),
        ("result wrong 2>&-", 2, ""),
    ],
)
def test_exit_code_with_streams_that_cannot_be_written(tmp_path: Path, redirected: str, code: int, errors: str) -> None:
    (tmp_path / "prints.py").write_text(PRINTS, encoding="utf-8")
    ended = run(f"{sys.executable} {tmp_path}/prints.py {redirected}; exit ${{PIPESTATUS[0]}}")
    assert (ended.returncode, ended.stderr.decode()) == (code, errors)


def test_closed_streams_leave_their_descriptors_to_no_file(tmp_path: Path) -> None:
    """A signal handler writes to descriptor 2, whatever it is."""
    program = (
        "import os; from megatron_slm.runtime.output import prepare_output; prepare_output(); "
        f"file = open({str(tmp_path / 'file')!r}, 'wb'); os.write(1, b'x'); os.write(2, b'x'); "
        "assert file.fileno() > 2 and os.fstat(file.fileno()).st_size == 0"
    )
    assert run(f'{sys.executable} -c "{program}" <&- >&- 2>&-').returncode == 0


def test_tables_in_a_file_are_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(*(f"column {number}" for number in range(20)))
    table.add_row(*("some long cell" for _ in range(20)))
    make_console().print(table)
    lines = output.getvalue().splitlines()
    assert len(lines) == 5 and lines[3].count("some long cell") == 20


def test_text_is_printed_verbatim(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("x[:a:] :key: 10:100:20", markup=False)
    assert capsys.readouterr().out == "x[:a:] :key: 10:100:20\n"


def test_byte_rates_are_in_megabytes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", -1)
    with progress("reading", 4_000_000, "B") as bar:
        bar.advance(1_000_000)
    [line] = capsys.readouterr().err.splitlines()  # the last amount is not repeated at the end
    assert line.startswith("reading: 1.0 MB of 4.0 MB (25%), ") and line.endswith(" MB/s")


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (0.0416, "steps", "0.042 steps/s"),
        (3.14, "documents", "3.1 documents/s"),
        (9.96, "steps", "10 steps/s"),
        (1234.5, "tokens", "1,234 tokens/s"),
        (0.0, "tokens", "0 tokens/s"),
        (3.4e6, BYTES, "3.4 MB/s"),
    ],
)
def test_slow_rates_have_digits(rate: float, unit: str, text: str) -> None:
    assert format_rate(rate, unit) == text
