"""Test the outputs of a selection: visible characters, terminal, JSON file, and the data of the page."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from views import SPECIAL, make_view

from megatron_slm.analysis.page import build_page, check_page
from megatron_slm.analysis.selection_page import NAME, page_data, write_selection_page
from megatron_slm.analysis.selection_terminal import print_selection
from megatron_slm.analysis.selection_view import PART, visible, write_json
from megatron_slm.runtime.errors import ConfigError

WORDS = ["The", " fox", *SPECIAL, " end"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n", "a↵\n"),
        ("\t", "⇥   "),
        ("", "·"),
        ("\x1b[0m\x00\x7f\x85", "⟨U+001B⟩[0m⟨U+0000⟩⟨U+007F⟩⟨U+0085⟩"),
        ("\u202eabc\u2028", "⟨U+202E⟩abc⟨U+2028⟩"),
        ("\u200d", "⟨U+200D⟩"),
        ("👩\u200d👧 é\u00a0", "👩\u200d👧 é\u00a0"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_invisible_characters_are_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("options", [{"table": False}, {"table": True}])
def test_a_terminal_without_color_marks_selected_tokens(options: dict[str, bool]) -> None:
    view = make_view(WORDS)
    output = io.StringIO()
    print_selection(Console(file=output, width=200, soft_wrap=True), view, 0, **options)
    printed = output.getvalue()
    assert "\x1b" not in printed and "\u202e" not in printed
    if not options["table"]:
        runs = "".join(re.findall(r"\[\[(.*?)\]\]", printed.replace("text 2, from token 8\n", ""), re.DOTALL))
        expected = [shown for shown, chosen in zip(view.shown(), view.checkpoints[0].selected, strict=True) if chosen]
        assert runs.replace("\n", "") == "".join(expected).replace("\n", "")
    assert f"{int(view.checkpoints[0].selected.sum())} of {len(view.ids)} tokens selected" in printed


def test_a_table_has_a_line_per_token_on_any_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    view = make_view([*WORDS, "漢"])
    for width in (1, 200):
        output = io.StringIO()
        print_selection(Console(file=output, width=width, soft_wrap=True), view, 0, table=True)
        _, heading, *lines = output.getvalue().splitlines()
        assert heading.split("  ")[0] == "position" and heading.endswith("selected")
        assert len(lines) == len(view.ids) + 1 and "漢" in lines[-3]
        loss = [f"{value:.3f}" for value in view.checkpoints[0].loss]
        assert [
            loss[place] in line and ("yes" in line) == view.checkpoints[0].selected[place]
            for place, line in enumerate(lines[:-1])
        ] == [True] * len(view.ids)
        ends = {cell_len(line[: line.index(value) + len(value)]) for line, value in zip(lines, loss, strict=False)}
        assert len(ends) == 1, "the column is aligned"


def test_many_texts_and_long_tables_are_printed_quickly() -> None:
    """Checks of the printed text took quadratic time, and rich's tables milliseconds per row."""
    view = make_view([" a"] * 20_000)
    view = replace(view, starts=list(range(len(view.ids) + 1)))
    for table in (False, True):
        start = time.process_time()
        print_selection(Console(file=io.StringIO(), width=200, soft_wrap=True), view, 0, table=table)
        assert time.process_time() - start < 10


def test_a_terminal_shows_colors_and_the_number_of_hidden_tokens() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system="truecolor", width=200, _environ={})
    print_selection(console, make_view(WORDS), 4, table=False)
    assert "[[" not in output.getvalue() and "\x1b[" in output.getvalue()
    assert f"{len(WORDS) + 1 - 4} more tokens" in output.getvalue()


def test_the_json_file_has_the_losses_of_every_token(tmp_path: Path) -> None:
    view = make_view(WORDS, 2)
    write_json(view, str(tmp_path / "s.json"))
    write_json(view, str(tmp_path / "s.json"))  # replaces its own file
    content = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert content["token_texts"] == [*WORDS, ""] and content["texts"] == [0, 8]
    for number, checkpoint in enumerate(content["checkpoints"]):
        excess = np.array(checkpoint["token_loss"]) - content["reference_loss"]
        assert np.allclose(checkpoint["excess_loss"], excess, atol=1e-4)
        assert checkpoint["selected"] == view.checkpoints[number].selected.astype(int).tolist()


def test_the_json_file_keeps_directories_that_are_not_utf_8(tmp_path: Path) -> None:
    view = make_view(WORDS)
    view = replace(view, checkpoints=[replace(view.checkpoints[0], directory="/caf\udce9")])
    write_json(view, str(tmp_path / "s.json"))
    content = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert content["checkpoints"][0]["directory"] == "/caf\udce9"


def test_the_data_of_a_page_cannot_end_its_script() -> None:
    view = make_view(WORDS)
    page = build_page(NAME, f"Selected tokens of {view.source}", page_data(view))
    assert "a&lt;b&gt;&amp;.txt" in page and "://" not in page
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    content = json.loads(data)
    assert [shown or PART for shown in content["shown"]] == view.shown() and content["shown"].count("") == 1
    assert "</script>" in content["shown"] and "{{js}}" in content["shown"]
    losses = np.frombuffer(base64.b64decode(content["checkpoints"][0]["loss"]), "<f4")
    assert np.array_equal(losses, view.checkpoints[0].loss)


def test_foreign_files_are_not_replaced(tmp_path: Path) -> None:
    page, other = tmp_path / "page.html", tmp_path / "other.html"
    write_selection_page(make_view(WORDS), str(page))
    check_page(str(page), NAME)
    other.write_text("<html>mine</html>")
    for path in (other, page):
        with pytest.raises(ConfigError, match="was not written by megatron_slm"):
            write_json(make_view(WORDS), str(path))
    with pytest.raises(ConfigError, match="was not written by megatron_slm"):
        write_selection_page(make_view(WORDS), str(other))
    assert other.read_text() == "<html>mine</html>"
