"""Selected tokens on a terminal, in color or with brackets, and their values as a table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from megatron_slm.analysis.selection_view import CheckpointTokens, SelectionView

OPEN, CLOSE = "[[", "]]"  # around selected tokens, without color
STYLES = ("black on #fde0b2", "black on #fbb04a", "black on #ee7f1b")  # selected, from the threshold up
UNSELECTED = "dim"
TEXT_COLUMNS = 2  # of the table, before the numbers
Line = tuple[int, int]  # (start, stop)


def print_selection(console: Console, view: SelectionView, limit: int, *, table: bool) -> None:
    """Print the first tokens of the text under each checkpoint, and a summary of all tokens.

    Args:
        limit: number of tokens to print; 0 prints all.
        table: print one line per token instead of the text.
    """
    count = min(limit or len(view.ids), len(view.ids))
    has_color = console.color_system is not None and not console.no_color
    shown = view.shown()
    for checkpoint in view.checkpoints:
        console.print(Text(checkpoint.label, style="bold"))
        if table:
            for line in _table(view, checkpoint, shown[:count]):
                console.print(line)
        else:
            console.print(_text(view, checkpoint, shown[:count], colored=has_color))
        if count < len(shown):
            more = f"... {len(shown) - count:,} more tokens (--max-tokens 0 prints all)"
            console.print(Text(more, style=UNSELECTED))
        console.print(Text(summary(view, checkpoint)))


def summary(view: SelectionView, checkpoint: CheckpointTokens) -> str:
    """Return counts, threshold, and mean losses of selected and unselected tokens."""
    selected, count = int(checkpoint.selected.sum()), len(checkpoint.selected)
    ratio = "" if checkpoint.ratio is None else f", k = {checkpoint.ratio:g}"
    parts = [
        f"{selected:,} of {count:,} tokens selected ({selected / count:.1%}) by {checkpoint.policy}{ratio}, "
        f"threshold {checkpoint.threshold:+.3f}"
    ]
    columns = {"token loss": checkpoint.loss}
    if view.reference is not None:
        columns["reference loss"] = view.reference.loss
    for name, values in columns.items():
        inside, outside = _mean(values[checkpoint.selected]), _mean(values[~checkpoint.selected])
        parts.append(f"{name} {inside} selected, {outside} unselected")
    return "; ".join(parts)


def _mean(values: NDArray[np.float32]) -> str:
    return f"{values.mean():.3f}" if len(values) else "-"


def _text(view: SelectionView, checkpoint: CheckpointTokens, shown: list[str], *, colored: bool) -> Text:
    """Return the tokens, colored by the rank of their score or with brackets around runs of selected tokens."""
    levels = _levels(checkpoint)
    text = Text()
    titles = len(view.starts) > 2
    for number, (start, stop) in enumerate(zip(view.starts, view.starts[1:], strict=False)):
        if start >= len(shown):
            break
        if titles:
            text.append(f"text {number + 1}, from token {start:,}\n", style="bold")
        stop = min(stop, len(shown))
        for first, last in _runs(checkpoint, start, stop):
            selected = bool(checkpoint.selected[first])
            if colored:
                for place in range(first, last):
                    text.append(shown[place], style=STYLES[levels[place]] if selected else UNSELECTED)
                continue
            run = "".join(shown[first:last])
            text.append(OPEN + run.rstrip("\n") + CLOSE + "\n" * run.endswith("\n") if selected else run)
        if not shown[stop - 1].endswith("\n"):
            text.append("\n")
    text.right_crop(1)
    return text


def _runs(checkpoint: CheckpointTokens, start: int, stop: int) -> Iterator[Line]:
    """Yield the runs of equally selected tokens in [start, stop)."""
    selected = checkpoint.selected[start:stop]
    edges = (np.flatnonzero(np.diff(selected)) + 1 + start).tolist()
    yield from zip([start, *edges], [*edges, stop], strict=True)


def _levels(checkpoint: CheckpointTokens) -> list[int]:
    """Return the third of the selected scores that each token is in, 0 for the one next to the threshold."""
    sign = -1 if checkpoint.lowest_first else 1
    scores = sign * checkpoint.score
    chosen = scores[checkpoint.selected]
    bounds = np.quantile(chosen, (1 / 3, 2 / 3)) if len(chosen) else np.zeros(2)
    return np.searchsorted(bounds, scores).tolist()


def _table(view: SelectionView, checkpoint: CheckpointTokens, shown: list[str]) -> Iterator[Text]:
    """Yield a heading and one line per token; rich's tables take milliseconds per row."""
    count = len(shown)
    columns: list[tuple[str, list[str]]] = [
        ("position", [f"{place:,}" for place in range(count)]),
        ("token", [token.replace("\n", "") for token in shown]),
        ("id", [str(token) for token in view.ids[:count]]),
        ("token loss", [f"{value:.3f}" for value in checkpoint.loss[:count]]),
    ]
    if view.reference is not None:
        columns.append(("reference loss", [f"{value:.3f}" for value in view.reference.loss[:count]]))
    if (excess := view.excess(checkpoint)) is not None:
        columns.append(("excess loss", [f"{value:+.3f}" for value in excess[:count]]))
    if checkpoint.score_name != "excess":
        columns.append((checkpoint.score_name, [f"{value:+.3f}" for value in checkpoint.score[:count]]))
    columns.append(("selected", ["yes" if selected else "" for selected in checkpoint.selected[:count]]))
    padded = [_pad([title, *cells], to_right=place < TEXT_COLUMNS) for place, (title, cells) in enumerate(columns)]
    for number, cells in enumerate(zip(*padded, strict=True)):
        yield Text("  ".join(cells).rstrip(), style="" if number else "bold")


def _pad(cells: list[str], *, to_right: bool) -> list[str]:
    """Return the cells of a column with the width of the widest one."""
    width = max(map(cell_len, cells))
    fill = [" " * (width - cell_len(cell)) for cell in cells]
    return [cell + space if to_right else space + cell for cell, space in zip(cells, fill, strict=True)]
