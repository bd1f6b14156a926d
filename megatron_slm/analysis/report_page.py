"""HTML report of one run, or comparison of several: curves, spikes, data usage, settings and environment."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.analysis.metric_columns import LARGEST, Series
from megatron_slm.analysis.page import write_page
from megatron_slm.analysis.run_files import RunFiles
from megatron_slm.analysis.svg_chart import BOX, Chart, Line, draw_chart
from megatron_slm.config.recipe import to_flat_dict
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.console import format_duration

NAME = "report"  # of the template
STEPS, TOKENS = "steps", "tokens"  # x axis
MAX_EVENTS = 100  # rows of the table of spikes
Usage = Mapping[str, Sequence[tuple[str, float | None]]]  # corpora of a run, and their shares of its tokens
Row = Sequence[str]

LOSS_NAMES = {"loss": "selected", "loss_all": "all", "loss_unselected": "unselected"}
SINGLE_CHARTS = (  # metric, title
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("share_selected", "share of tokens selected"),
    ("threshold", "threshold (lowest selected score)"),
    ("tokens_per_second", "throughput (tokens per second)"),
    ("tflops", "model TFLOP/s per device"),
    ("loss_scale", "loss scale"),
)


def write_report(
    runs: Sequence[RunFiles], path: str, *, axis: str, objectives: Mapping[str, str], usage: Usage
) -> None:
    """Write the report, atomically.

    Args:
        axis: "steps" or "tokens", the x axis of all curves.
        objectives: by name of the run.
        usage: by name of the run.
    """
    charts = [draw_chart(chart) for chart in _charts(runs, axis)]
    curves = f'<div class="charts">{"".join(figure for figure, _ in charts)}</div>' if charts else "<p>none yet</p>"
    content = "".join(
        [
            _section("Summary", _table(("", *(run.name for run in runs)), _summary(runs, objectives))),
            _section("Curves", curves),
            _section("Spikes and NaN", _events(runs)),
            _section("Data usage", _usage(runs, usage)),
            _section("Settings", _settings(runs)),
            _section("Environment of the latest start", _environment(runs)),
            _section("Missing and unreadable files", _notes(runs)),
        ]
    )
    title = f"{'Comparison' if len(runs) > 1 else 'Report'} of {', '.join(run.name for run in runs)}"
    write_page(
        path, NAME, title, {"axis": axis, "box": BOX, "charts": [points for _, points in charts]}, content=content
    )


def _charts(runs: Sequence[RunFiles], axis: str) -> Iterator[Chart]:
    """Yield the charts that have values."""
    for chart in _all_charts(runs, axis):
        if any(line.has_values for line in chart.lines):
            yield chart


def _all_charts(runs: Sequence[RunFiles], axis: str) -> Iterator[Chart]:
    if len(runs) == 1:
        [run] = runs
        names = LOSS_NAMES if len(run.series("loss_unselected")) else {"loss_all": "all tokens"}
        lines = [_line(label, run.series(metric), axis) for metric, label in names.items()]
        yield Chart("training loss (nats per token)", lines, axis, _marks(run, axis))
    else:
        for metric, label in (("loss_all", "all"), ("loss", "selected"), ("loss_unselected", "unselected")):
            yield _comparison(f"training loss, {label} tokens (nats)", runs, metric, axis)
    yield from _evaluations(runs, axis)
    for metric, title in SINGLE_CHARTS:
        yield _comparison(title, runs, metric, axis)


def _comparison(title: str, runs: Sequence[RunFiles], metric: str, axis: str) -> Chart:
    lines = [_line(run.name, run.series(metric), axis) for run in runs]
    marks = _marks(runs[0], axis) if len(runs) == 1 and metric == "grad_norm" else ()
    return Chart(title, lines, axis, marks)


def _evaluations(runs: Sequence[RunFiles], axis: str) -> Iterator[Chart]:
    """Yield one chart for all held-out losses of one run, or one per set; and one per metric of the benchmarks."""
    if len(runs) == 1:
        [run] = runs
        lines = [_line(name, run.series("loss", "eval", name), axis) for name in run.sets()]
        yield Chart("held-out loss (nats per token)", lines, axis)
    else:
        for name in dict.fromkeys(name for run in runs for name in run.sets()):
            lines = [_line(run.name, run.series("loss", "eval", name), axis) for run in runs]
            yield Chart(f"held-out loss, {name} (nats per token)", lines, axis)
    tasks = dict.fromkeys(name for run in runs for name in run.sets("task"))
    metrics = dict.fromkeys(name for run in runs for name in run.metric_names("task"))
    for metric in (name for name in metrics if not name.endswith("_stderr") and name != "documents"):
        lines = [
            _line(f"{run.name} {task}" if len(runs) > 1 else task, run.series(metric, "task", task), axis)
            for run in runs
            for task in tasks
        ]
        yield Chart(f"benchmarks, {metric}", lines, axis)


def _line(label: str, series: Series, axis: str) -> Line:
    return Line(label, series.tokens if axis == TOKENS else series.steps, series.values)


def _marks(run: RunFiles, axis: str) -> list[tuple[float, str]]:
    """Return the steps of events, as positions on the axis."""
    steps = np.array([event["step"] for event in run.events], float)
    if axis == TOKENS:
        steps = _tokens_at(steps, {0: 0, **run.columns.tokens_by_step()})
    return [(at, str(event.get("message", ""))) for at, event in zip(steps.tolist(), run.events, strict=True)]


def _tokens_at(steps: NDArray[np.float64], logged: Mapping[int, int]) -> NDArray[np.float64]:
    """Return the tokens at each step: interpolated between logged steps, and continued after the last one."""
    known, tokens = (np.array(values, float) for values in zip(*sorted(logged.items()), strict=True))
    rate = (tokens[-1] - tokens[-2]) / (known[-1] - known[-2]) if len(known) > 1 else 0.0
    return np.interp(steps, known, tokens) + rate * np.maximum(steps - known[-1], 0)


def _summary(runs: Sequence[RunFiles], objectives: Mapping[str, str]) -> list[Row]:
    """Return the rows of the summary, one column per run."""
    rows: list[tuple[str, Callable[[RunFiles], str]]] = [
        ("objective", lambda run: objectives[run.name]),
        ("steps", _progress),
        ("tokens", lambda run: f"{run.tokens:,}" if run.tokens else ""),
        ("start", _origin),
        ("last record", lambda run: run.updated),
        ("checkpoints", lambda run: _steps(run.checkpoints)),
        *((f"training loss, {label}", _last(metric)) for metric, label in LOSS_NAMES.items()),
        *(
            (f"held-out loss, {name}", _held_out(name))
            for name in dict.fromkeys(name for run in runs for name in run.sets())
        ),
        ("tokens per second, median", _throughput),
        ("time of the logged steps", _duration),
        ("spikes and NaN", lambda run: f"{len(run.events):,}"),
    ]
    table = [(title, *(value(run) for run in runs)) for title, value in rows]
    return [row for row in table if any(row[1:])]


def _progress(run: RunFiles) -> str:
    planned = run.settings.get("train_iters")
    if not isinstance(planned, int):
        return f"{run.step:,}"
    return f"{run.step:,} of {planned:,} ({'complete' if run.step >= planned else 'not complete'})"


def _origin(run: RunFiles) -> str:
    if not run.origin:
        return "" if run.origin is None else "from scratch"
    step = run.origin.get("step")
    kind = "weights of" if run.origin.get("weights_only") else "continues"
    return f"{kind} {run.origin.get('path')}" + (f", step {step:,}" if isinstance(step, int) else "")


def _steps(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:2], "...", *shown[-3:]])


def _last(metric: str) -> Callable[[RunFiles], str]:
    def value(run: RunFiles) -> str:
        series, steps = run.series(metric), run.series("loss").steps
        is_last = len(series) and (not len(steps) or series.steps[-1] == steps[-1])
        return f"{series.values[-1]:.4f}" if is_last else ""  # no unselected tokens in the last record

    return value


def _held_out(name: str) -> Callable[[RunFiles], str]:
    def value(run: RunFiles) -> str:
        series = run.series("loss", "eval", name)
        finite = series.values[np.isfinite(series.values)]
        return f"{series.values[-1]:.4f} (lowest {finite.min():.4f})" if len(finite) else ""

    return value


def _throughput(run: RunFiles) -> str:
    values = run.series("tokens_per_second").values
    values = values[np.isfinite(values)]
    return f"{np.median(values):,.0f}" if len(values) else ""


def _duration(run: RunFiles) -> str:
    """Return the sum of the step times; a log interval's record has the mean time of its steps.

    Earlier starts may have had other intervals; a distance of records that is longer than its neighbors is a gap.
    """
    series, interval = run.series("seconds"), run.settings.get("log_interval")
    interval = interval if isinstance(interval, int) and 0 < interval < LARGEST else 1
    distances = np.diff(series.steps, prepend=0)
    neighbors = np.maximum(np.append(distances[1:], 0), np.append(0, distances[:-1]))
    steps = np.minimum(distances, np.maximum(neighbors, interval))
    return format_duration(float(np.nansum(series.values * steps))) if np.isfinite(series.values).any() else ""


def _events(runs: Sequence[RunFiles]) -> str:
    rows = [
        (*([run.name] if len(runs) > 1 else []), f"{event['step']:,}", *_event(event))
        for run in runs
        for event in run.events
    ]
    if not rows:
        return "<p>none</p>"
    head = (*(["run"] if len(runs) > 1 else []), "step", "time", "event", "action", "message")
    more = f"<p>{len(rows) - MAX_EVENTS:,} more in the events files</p>" if len(rows) > MAX_EVENTS else ""
    return _table(head, rows[:MAX_EVENTS]) + more


def _event(event: Mapping[str, Any]) -> Row:
    return [str(event.get(name, "")) for name in ("time", "event", "action", "message")]


def _usage(runs: Sequence[RunFiles], usage: Usage) -> str:
    rows = []
    for run in runs:
        for corpus, share in usage.get(run.name, ()):
            known = ("by size", "") if share is None else (f"{share:.2%}", f"{share * run.tokens:,.0f}")
            rows.append((*([run.name] if len(runs) > 1 else []), corpus, *known))
    if not rows:
        return "<p>The settings name no corpus.</p>"
    head = (*(["run"] if len(runs) > 1 else []), "corpus", "weight", "tokens of the run so far (weight × tokens)")
    return _table(head, rows)


def _settings(runs: Sequence[RunFiles]) -> str:
    """Return the settings that differ between runs, and those of each run that differ from the defaults."""
    defaults = to_flat_dict(RunConfig())
    known = [run for run in runs if run.settings]
    parts = [f"<p>{html.escape(run.name)} has saved no settings yet.</p>" for run in runs if not run.settings]
    if len(known) > 1:
        names = dict.fromkeys(name for run in known for name in run.settings)
        values = {name: [_text(run.settings.get(name)) for run in known] for name in names}
        rows = [(name, *texts) for name, texts in values.items() if len(set(texts)) > 1]
        parts.append(_table(("differs", *(run.name for run in known)), rows) if rows else "<p>All are equal.</p>")
    for run in known:
        rows = [
            (name, _text(value), _text(defaults.get(name)))
            for name, value in run.settings.items()
            if value != defaults.get(name)
        ]
        table = _table(("setting", "value", "default"), rows)
        is_open = " open" if len(runs) == 1 else ""
        parts.append(f"<details{is_open}><summary>{html.escape(run.name)}: changed settings</summary>{table}</details>")
    return "".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{name}={_text(each)}" for name, each in value.items())
    return "" if value is None else str(value)


def _environment(runs: Sequence[RunFiles]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = [(name, *(_text(run.environment.get(name)) for run in runs)) for name in names]
    return _table(("", *(run.name for run in runs)), rows) if rows else "<p>not recorded</p>"


def _notes(runs: Sequence[RunFiles]) -> str:
    return "".join(f"<p>{html.escape(note)}</p>" for run in runs for note in run.notes)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _table(head: Row, rows: Sequence[Row]) -> str:
    """Return a table whose first column names its rows."""
    lines = ["".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)]
    for first, *cells in rows:
        lines.append(
            f'<th scope="row">{html.escape(first)}</th>' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        )
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
