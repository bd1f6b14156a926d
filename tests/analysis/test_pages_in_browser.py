"""Test the HTML pages in Chromium: hover, keyboard, sliders, search, and speed with 100,000 tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from views import SPECIAL, make_view

from megatron_slm.analysis.selection_page import write_selection_page
from megatron_slm.analysis.selection_view import SelectionView

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="apt-get install chromium"),
]
SLOW_UPDATE = 100  # ms; one update of a slider
# Returns the times of updates in ms, until the frame is drawn.
MOVE_SLIDER = """async () => {
  const slider = document.getElementById("threshold"), times = [];
  for (let step = 0; step < 9; step++) {
    const start = performance.now();
    slider.value = 100 + 90 * step;
    slider.dispatchEvent(new Event("input"));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - start);
  }
  return times;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as programs:
        chromium = programs.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Return a tab without network; an error in a script fails the test."""
    tab, errors = browser.new_page(viewport={"width": 1200, "height": 800}, offline=True), []
    tab.on("pageerror", lambda error: errors.append(error))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield tab
    tab.close()
    assert not errors


def show(page: Any, directory: Path, view: SelectionView) -> SelectionView:
    write_selection_page(view, str(directory / "page.html"))
    page.goto(f"file://{directory / 'page.html'}")
    return view


def words(count: int) -> list[str]:
    chosen = random.Random(1)
    return [" " + "".join(chosen.choices("abcdefgh", k=chosen.randint(1, 6))) for _ in range(count)]


def selected(page: Any) -> int:
    return page.locator("main .s").count()


def test_tokens_are_shown_as_text_and_selected(page: Any, tmp_path: Path) -> None:
    view = show(page, tmp_path, make_view(["The", " fox", *SPECIAL], 2))
    assert page.locator("main span:not(.at)").all_text_contents() == view.shown()
    assert selected(page) == view.checkpoints[0].selected.sum()
    assert page.title() == "Selected tokens of a<b>&.txt"


def test_hover_and_keys_show_the_losses_of_a_token(page: Any, tmp_path: Path) -> None:
    view = show(page, tmp_path, make_view(["The", " fox", *SPECIAL], 2))
    details = page.locator("#details")
    page.locator("main p span").nth(1).hover()
    assert "“ fox”" in details.text_content()
    assert f"{view.checkpoints[0].loss[1]:.3f}" in details.text_content()
    page.keyboard.press("Tab")
    page.locator("main").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("n")
    place = 2 + int(np.argmax(view.checkpoints[0].selected[2:]))
    assert f"token {place}," in details.text_content() and "not selected" not in details.locator("div").text_content()
    page.keyboard.press("Escape")
    assert details.is_hidden()


def test_sliders_recompute_the_selection(page: Any, tmp_path: Path) -> None:
    view = show(page, tmp_path, make_view(words(200), 3))
    page.locator("#checkpoint").fill("2")
    playwright.expect(page.locator("#checkpoint-name")).to_contain_text("300")
    assert selected(page) == view.checkpoints[2].selected.sum()
    page.locator("#threshold").fill("900")
    playwright.expect(page.locator("#reset")).to_be_enabled()
    score = view.checkpoints[2].score
    assert selected(page) == (score >= np.sort(score)[-int(np.ceil(0.1 * len(score)))]).sum()
    page.locator("#reset").click()
    playwright.expect(page.locator("#reset")).to_be_disabled()
    assert selected(page) == view.checkpoints[2].selected.sum()


@pytest.mark.parametrize(("ratio", "shown"), [(1 / 3, "excess with k = 0.333333. "), (None, "excess. ")])
def test_the_summary_has_the_ratio_of_the_policy(page: Any, tmp_path: Path, ratio: float | None, shown: str) -> None:
    view = make_view(words(9))
    show(page, tmp_path, replace(view, checkpoints=[replace(view.checkpoints[0], ratio=ratio)]))
    assert f" by {shown}" in page.locator("#summary").text_content()


def test_the_threshold_slider_is_exact(page: Any, tmp_path: Path) -> None:
    """1 − 0.7 is above 0.3 in binary, and 30% of 10 tokens are 3."""
    show(page, tmp_path, make_view(words(9)))
    page.locator("#threshold").fill("700")
    playwright.expect(page.locator("#reset")).to_be_enabled()
    assert selected(page) == 3


def test_search_finds_characters_of_several_tokens(page: Any, tmp_path: Path) -> None:
    """Tokens of a byte tokenizer: the text of a character is that of its last token."""
    show(page, tmp_path, replace(make_view(["c", "a", "f", "", "é", "·", "", "", "漢"]), starts=[0, 10]))
    page.locator("#search").fill("fé·漢")
    assert page.locator("#matches").text_content() == "1 of 1"
    assert page.locator("main .match").all_text_contents() == ["f", "·", "é", "·", "·", "·", "漢"]


def test_search_finds_nothing_across_texts(page: Any, tmp_path: Path) -> None:
    show(page, tmp_path, replace(make_view(["a", "b", "c", "d"]), starts=[0, 2, 5]))
    for wanted, found in (("bc", "not found"), ("cd", "1 of 1"), ("ab", "1 of 1")):
        page.locator("#search").fill(wanted)
        assert page.locator("#matches").text_content() == found
        if found != "not found":
            assert page.locator("main .match").all_text_contents() == list(wanted)


def test_search_finds_text_across_tokens(page: Any, tmp_path: Path) -> None:
    show(page, tmp_path, replace(make_view([*words(900), " Needle", "s", *words(900)]), starts=[0, 1803]))
    page.locator("#search").fill("needles a")
    page.locator("#search").fill("needles")
    assert page.locator("#matches").text_content() == "1 of 1"
    assert page.locator("main .match").all_text_contents() == [" Needle", "s"]
    page.locator("#search").fill("<script>")
    assert page.locator("#matches").text_content() == "not found"


@pytest.mark.slow
def test_a_hundred_thousand_tokens_respond_quickly(page: Any, tmp_path: Path) -> None:
    show(page, tmp_path, make_view(words(100_000), 3))
    assert page.locator("main span:not(.at)").count() < 5_000  # only near the window
    page.evaluate(MOVE_SLIDER)
    times = page.evaluate(MOVE_SLIDER)
    assert sorted(times)[len(times) // 2] < SLOW_UPDATE, times
