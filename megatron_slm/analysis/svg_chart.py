"""Line charts as inline SVG, legible without a script, and their values for the script that shows them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 38  # margins
BOX = (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM)  # of the curves: left, right, top, bottom
COLORS = 6  # classes c0, c1, ... of the style sheet
DASHES = ("", "6 3", "2 2", "8 3 2 3")  # a further distinction, after the colors have been used
MAX_POINTS = 500  # per line; longer lines are means with a band from the lowest to the highest value
DIGITS = 6  # of values for the script


@dataclass(frozen=True)
class Line:
    """Represent one curve; NaN interrupts it."""

    label: str
    x: Sequence[float] | NDArray[np.generic]
    y: Sequence[float] | NDArray[np.float64]

    @property
    def has_values(self) -> bool:
        """Return whether a value is finite."""
        return bool(np.isfinite(self.y).any())


@dataclass(frozen=True)
class Chart:
    """Represent a chart of several lines over one axis."""

    title: str
    lines: Sequence[Line]
    x_label: str
    marks: Sequence[tuple[float, str]] = ()  # (x, text) of marked steps


@dataclass(frozen=True)
class Points:
    """Represent a line of at most :data:`MAX_POINTS` points."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]

    @property
    def is_reduced(self) -> bool:
        """Return whether points are means of different values."""
        return any(low < high for low, high in zip(self.low, self.high, strict=True))


def reduce_points(line: Line, limit: int = MAX_POINTS) -> Points:
    """Return the line itself, or the mean, lowest and highest value of equally many points each."""
    x, y = np.asarray(line.x), np.asarray(line.y, float)
    size = max(1, math.ceil(len(x) / limit))
    starts = np.arange(0, len(x), size)
    finite = np.isfinite(y)
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    count = np.add.reduceat(finite, starts, dtype=int)
    with np.errstate(over="ignore"):
        mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / np.maximum(count, 1)
    mean = np.clip(mean, np.minimum(low, high), np.maximum(low, high))  # of a sum that overflows
    mean, low, high = (np.where(count, values, np.nan).tolist() for values in (mean, low, high))
    return Points(x[np.minimum(starts + size, len(x)) - 1].tolist(), mean, low, high)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers in [low, high], about ``count``."""
    span = high - low
    if not span > 0:
        return [low]
    exponent = math.floor(math.log10(span / count))
    power = 10.0**exponent
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / count)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, -exponent) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Format the ticks of an axis with as many digits as distinguish them."""
    labels = list[str]()
    for digits in range(4, 17):
        labels = [short_number(value, digits) for value in values]
        if len(set(labels)) == len(set(values)):
            break
    return labels


def short_number(value: float, digits: int = 4) -> str:
    """Format a number of an axis."""
    size = abs(value)
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * (10 if unit == 1e3 else 1):
            return f"{value / unit:.{digits}g}{suffix}".replace("-", "−")
    return (f"{value:.{digits - 1}g}" if size < 1e-3 and value else f"{value:.{digits}g}").replace("-", "−")


def draw_chart(chart: Chart) -> tuple[str, dict[str, Any]]:
    """Return a chart as HTML, and its points for the script."""
    # numbered before lines without values are left out, so that a run has one color in all charts
    lines = [(number, line.label, reduce_points(line)) for number, line in enumerate(chart.lines) if line.has_values]
    title = html.escape(chart.title)
    if not lines:
        return f'<figure class="chart"><figcaption>{title}</figcaption><p>no values</p></figure>', {}
    scale = _Scale.fit([points for _, _, points in lines], [x for x, _ in chart.marks])
    body = [*_axes(scale, chart.x_label), *_marks(scale, chart.marks)]
    for number, _, points in lines:
        body += _curve(scale, points, number)
    legend = "".join(
        f'<span class="key c{number % COLORS}"><svg viewBox="0 0 24 8" aria-hidden="true">'
        f'<path d="M0 4H24"{_dash(number)}/></svg>{html.escape(label)}</span>'
        for number, label, _ in lines
    )
    legend = f'<div class="legend">{legend}</div>' if len(chart.lines) > 1 else ""
    figure = (
        f'<figure class="chart"><figcaption>{title}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" tabindex="0" role="img" aria-label="{title}">{"".join(body)}</svg>'
        f"{legend}</figure>"
    )
    values = [
        {"number": number, "label": label, "x": points.x, "y": [_value(value) for value in points.y]}
        for number, label, points in lines
    ]
    return figure, {"x": [scale.x_low, scale.x_high], "y": [scale.y_low, scale.y_high], "lines": values}


def _value(value: float) -> float | None:
    """Return a value for the script, None for NaN."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class _Scale:
    """Map values to the coordinates of the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @staticmethod
    def fit(lines: Sequence[Points], marks: Sequence[float]) -> _Scale:
        """Return the scale that shows all points and marks."""
        x = [*marks, *(value for points in lines for value in points.x)]
        y = [value for points in lines for each in (points.low, points.high) for value in each if math.isfinite(value)]
        margin = 0.05 * (max(y) - min(y)) or 0.05 * abs(max(y)) or 1.0
        return _Scale(min(x), max(x) if max(x) > min(x) else min(x) + 1, min(y) - margin, max(y) + margin)

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low), 1)

    def y(self, value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (self.y_high - value) / (self.y_high - self.y_low), 1)


def _axes(scale: _Scale, x_label: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    values = ticks(scale.y_low, scale.y_high)
    for value, label in zip(values, tick_labels(values), strict=True):
        y = scale.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{right}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
    values = ticks(scale.x_low, scale.x_high)
    for value, label in zip(values, tick_labels(values), strict=True):
        parts.append(f'<text x="{scale.x(value)}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    return parts


def _marks(scale: _Scale, marks: Sequence[tuple[float, str]]) -> list[str]:
    return [
        f'<path class="mark" d="M{scale.x(x)} {TOP}V{HEIGHT - BOTTOM}"><title>{html.escape(text)}</title></path>'
        for x, text in marks
    ]


def _curve(scale: _Scale, points: Points, number: int) -> list[str]:
    style = f"c{number % COLORS}"
    parts = []
    for run in _finite_runs(points.y):
        if points.is_reduced:
            upper = [f"{scale.x(points.x[i])} {scale.y(points.high[i])}" for i in run]
            lower = [f"{scale.x(points.x[i])} {scale.y(points.low[i])}" for i in reversed(run)]
            parts.append(f'<path class="band {style}" d="M{"L".join(upper + lower)}Z"/>')
        path = "L".join(f"{scale.x(points.x[i])} {scale.y(points.y[i])}" for i in run)
        parts.append(f'<path class="line {style}"{_dash(number)} d="M{path}"/>')
    if len(points.x) <= 30:
        dots = (
            f'<circle class="{style}" cx="{scale.x(x)}" cy="{scale.y(y)}" r="2.5"/>'
            for x, y in zip(points.x, points.y, strict=True)
            if math.isfinite(y)
        )
        parts += dots
    return parts


def _finite_runs(values: Sequence[float]) -> list[range]:
    """Return the ranges of consecutive finite values."""
    runs, start = list[range](), 0
    for place in range(len(values) + 1):
        if place == len(values) or not math.isfinite(values[place]):
            if place > start:
                runs.append(range(start, place))
            start = place + 1
    return runs


def _dash(number: int) -> str:
    pattern = DASHES[number // COLORS % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""
