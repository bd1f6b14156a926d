"""Test the report and the plots of runs, from the files that an active, broken or resumed run leaves."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest

from megatron_slm.analysis.metric_columns import Metrics
from megatron_slm.analysis.metrics_plot import smooth
from megatron_slm.analysis.run_files import read_run, read_runs
from megatron_slm.analysis.svg_chart import (
    BOX,
    Chart,
    Line,
    draw_chart,
    reduce_points,
    short_number,
    tick_labels,
    ticks,
)
from megatron_slm.cli.plot_metrics import main as plot_main
from megatron_slm.cli.report import main as report_main
from megatron_slm.config.recipe import dump_config, with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.tiny import captured
from megatron_slm.training.save_directory import RunRecord, write_record


def record(step: int, **values: Any) -> dict[str, Any]:
    losses = {"loss": 5 - 0.1 * step, "loss_all": 4.5, "loss_unselected": 4.0, "share_selected": 0.6}
    rates = {"threshold": 0.1, "grad_norm": 1.0, "lr": 1e-3, "seconds": 2.0, "tokens_per_second": 100.0}
    return {"kind": "train", "step": step, "tokens": 64 * step, **losses, **rates, "selection": "00ff", **values}


def make_run(directory: Path, records: list[dict[str, Any]], **settings: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    if settings:
        (directory / "iter_0000002").mkdir()
        (directory / "iter_0000002" / "config.yaml").write_text(dump_config(with_settings(RunConfig(), settings)))
    return directory


def held_out(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "tokens": 64 * step, "set": "clean & <raw>", "loss": loss}


SLM = {"objective": "slm", "train_iters": 4, "data_path": ["0.3", "/data/a<b>", "0.1", "/data/c"]}
SPIKE = {"kind": "event", "step": 2, "event": "spike", "action": "log", "message": "step 2: <loss> exceeds"}


def test_a_report_has_curves_events_usage_and_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "slm", [held_out(0, 6.0), *map(record, range(1, 5)), held_out(4, 5.0)], **SLM)
    (run / "events.jsonl").write_text(json.dumps(SPIKE) + "\n")
    assert captured([str(run)], report_main).code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    for text in ("4 of 4 (complete)", "clean &amp; &lt;raw&gt;", "5.0000 (lowest 5.0000)", "8s", "/data/a&lt;b&gt;"):
        assert text in page
    assert "75.00%" in page and ">192<" in page  # share of the first corpus, and its tokens
    assert page.count('<path class="mark"') == 2 and "&lt;loss&gt; exceeds" in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert captured([str(run)], report_main).code == 0  # replaces its own file


def test_runs_without_threshold_checkpoint_or_complete_lines(tmp_path: Path) -> None:
    clm = [record(step, loss_unselected=None, threshold=None, share_selected=1.0) for step in (1, 2)]
    odd = {"kind": "eval", "step": 3, "loss": "NaN", "tokens": None}
    active, empty = make_run(tmp_path / "a" / "run", clm), make_run(tmp_path / "b" / "run", [])
    with (active / "metrics.jsonl").open("a") as file:
        lines = [json.dumps({**clm[1], "loss_all": math.nan}), "[1]", json.dumps(odd), json.dumps(record(3))[:50]]
        file.write("\n".join(lines))
    (empty / "slm_run.json").write_text('{"run_id": "x", "environment": {"host": "n1"}, "settings": {"lr": 1.0}}')
    result = captured([str(active), str(empty), "--html", str(tmp_path / "r.html")], report_main)
    assert result.code == 0, result.errors
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "lowest selected score" not in page and "has saved no settings yet" in page and "n1" in page
    first, second = read_runs([str(active), str(empty)])
    assert [first.name, second.name] == [str(active), str(empty)]  # equal names are distinguished
    assert (
        first.step == 3 and first.series("loss_all").values[0] == 4.5 and math.isnan(first.series("loss_all").values[1])
    )


def test_a_run_without_a_checkpoint_has_the_settings_of_its_start(tmp_path: Path) -> None:
    write_record(tmp_path, RunRecord.new(None), with_settings(RunConfig(), {"lr": 0.5}))
    run = read_run(str(tmp_path))
    assert run.settings["lr"] == 0.5 and run.environment["processes"] == 1 and run.origin == {}
    (tmp_path / "metrics.jsonl.1").write_text(json.dumps(record(1)) + "\n")  # of an earlier run
    assert read_run(str(tmp_path / "metrics.jsonl.1")).settings == {}


def test_paths_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("theirs\n")
    (tmp_path / "report.html").write_text("theirs")
    run = make_run(tmp_path / "run", [record(1)])
    for argv, message in (
        ([str(tmp_path / "missing")], "no such file or directory"),
        ([str(tmp_path)], "is not a metrics file of this trainer"),
        ([str(run), "--html", str(tmp_path / "report.html")], "report.html exists and was not written by"),
        ([str(run / "metrics.jsonl"), "--html", str(tmp_path / "no" / "x.html")], "does not exist. Create it"),
    ):
        result = captured(argv, report_main)
        assert result.code == 2 and message in result.errors, result
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="nor a checkpoint"):
        read_run(str(tmp_path / "nothing"))


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_plots_replace_their_own_files(suffix: str, tmp_path: Path) -> None:
    argv = [str(make_run(tmp_path / "run", [record(1), record(2)])), "--metrics", "loss"]
    for _ in range(2):
        result = captured([*argv, "--output", str(tmp_path / f"plot{suffix}")], plot_main)
        assert result.code == 0, result.errors


def test_a_run_that_is_named_twice_is_shown_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(1)])
    assert len(read_runs([str(run), f"{run}/", str(run / "metrics.jsonl")])) == 1


def test_numbers_beyond_floating_point_and_settings_of_other_types_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(1, lr=10**400), record(2)])
    assert read_run(str(run)).series("lr").steps == [2]
    damaged = {"settings": {"data_path": 5, "log_interval": "x"}, "origin": {"step": "x"}}
    (run / "slm_run.json").write_text(json.dumps(damaged))
    assert captured([str(run)], report_main).code == 0


@pytest.mark.parametrize("values", [(1.7e308, -1.7e308), (1e300, -1e300), (1e308, 1e308), (5e-324, 0.0)])
def test_values_at_the_limits_of_floating_point_are_shown(values: tuple[float, float], tmp_path: Path) -> None:
    """Sums of such values and margins around them are infinite."""
    run = make_run(tmp_path / "run", [record(step, grad_norm=each, seconds=each) for step, each in enumerate(values)])
    result = captured([str(run)], report_main)
    assert result.code == 0, result.errors
    result = captured([str(run), "--output", str(tmp_path / "p.svg"), "--metrics", "grad_norm"], plot_main)
    assert result.code == 0 and not result.errors, result.errors


def test_damaged_events_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(1), record(2)])
    events = [{**SPIKE, "step": 10**400}, {**SPIKE, "step": True}, {"kind": "event", "step": 1}, SPIKE]
    (run / "events.jsonl").write_text("".join(json.dumps({**each, "samples": [1]}) + "\n" for each in events))
    assert read_run(str(run)).events == [{"step": 1}, {name: SPIKE[name] for name in SPIKE if name != "kind"}]
    (run / "slm_run.json").write_text(json.dumps({"settings": {"log_interval": 10**400}}))
    assert captured([str(run)], report_main).code == 0


def test_a_relative_metrics_file_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, save = tmp_path / "start", tmp_path / "save"
    make_run(start / "logs", [record(1), record(2)])
    (start / "logs" / "events.jsonl").write_text(json.dumps(SPIKE) + "\n")
    settings = {"slm_metrics_file": "logs/metrics.jsonl", "slm_events_file": "logs/events.jsonl"}
    save.mkdir()
    monkeypatch.chdir(start)
    write_record(save, RunRecord.new(None), with_settings(RunConfig(), settings))
    monkeypatch.chdir(tmp_path)
    run = read_run("save")
    assert (run.name, run.step, len(run.events), run.notes) == ("save", 2, 1, [])
    assert len(read_runs(["save", "start/logs/metrics.jsonl"])) == 1
    (start / "logs").rename(start / "other")
    for main, flags in ((report_main, []), (plot_main, ["--output", "p.svg"])):
        assert "logs/metrics.jsonl of the run does not exist" in captured(["save", *flags], main).errors
    assert "logs/metrics.jsonl of the run does not exist" in (save / "report.html").read_text(encoding="utf-8")


def test_a_resumed_run_has_the_settings_and_metrics_of_its_latest_start(tmp_path: Path) -> None:
    """Its newest checkpoint may be one of an earlier start."""
    run = make_run(tmp_path / "run", [record(1), record(2)], train_iters=2)
    settings: dict[str, Any] = {"train_iters": 9}
    write_record(run, RunRecord.new(None), with_settings(RunConfig(), settings))
    assert (read_run(str(run)).settings["train_iters"], read_run(str(run)).step) == (9, 2)
    write_record(run, RunRecord.new(None), with_settings(RunConfig(), {**settings, "slm_metrics_file": "new.jsonl"}))
    assert (read_run(str(run)).metrics.name, read_run(str(run)).step) == ("metrics.jsonl", 2), "no step is logged yet"
    settings["slm_metrics_file"] = str(tmp_path / "new.jsonl")
    write_record(run, RunRecord.new(None), with_settings(RunConfig(), settings))
    (tmp_path / "new.jsonl").touch()  # at the start
    assert (read_run(str(run)).metrics.name, read_run(str(run)).step) == ("metrics.jsonl", 2)
    (tmp_path / "new.jsonl").write_text(json.dumps(record(3)) + "\n")
    found = read_run(str(run))
    assert (found.metrics.name, found.step) == ("new.jsonl", 3) and "those of earlier steps" in found.notes[0]
    settings["slm_metrics_file"] = str(run / "metrics.jsonl")
    write_record(run, RunRecord.new(None), with_settings(RunConfig(), settings))
    assert read_run(f"{run}/../run").notes == [], "the same file"


def test_metrics_that_two_runs_name_belong_to_one_of_them(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [], slm_metrics_file=str(tmp_path / "m.jsonl")) for name in ("a", "b")]
    for run in runs:
        (run / "metrics.jsonl").unlink()
    (tmp_path / "m.jsonl").write_text(json.dumps(record(1)) + "\n")
    with pytest.raises(ConfigError, match="have the same metrics file"):
        read_runs([str(run) for run in runs])
    assert [run.name for run in read_runs([str(runs[0]), f"{runs[0]}/"])] == ["a"]


@pytest.mark.parametrize("named", ["/dev/null", "logs/missing.jsonl"])
def test_runs_without_metrics_are_different_runs(named: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, RunRecord.new(None), with_settings(RunConfig(), {"slm_metrics_file": named}))
    assert [run.name for run in read_runs([str(tmp_path / name) for name in ("a", "b", "a/")])] == ["a", "b"]


@pytest.mark.parametrize(
    ("steps", "interval", "time"),
    [
        ([10, 20, 30, 31, 32], 1, "1m04s"),  # a resume with another interval
        ([1, 2, 3, 13, 23], 10, "46s"),
        ([10, 13, 23], 10, "46s"),  # interrupted at step 13
        ([110, 120, 1030, 1040], 10, "1m20s"),  # a run that continues another one; metrics in another file meanwhile
    ],
)
def test_times_are_those_of_the_logged_steps(steps: list[int], interval: int, time: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(step) for step in steps], log_interval=interval)
    assert captured([str(run)], report_main).code == 0
    assert f"time of the logged steps</th><td>{time}</td>" in (run / "report.html").read_text(encoding="utf-8")


def test_the_median_of_two_values_is_between_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(1), record(2, tokens_per_second=300.0)])
    assert captured([str(run)], report_main).code == 0
    assert "tokens per second, median</th><td>200</td>" in (run / "report.html").read_text(encoding="utf-8")


def test_losses_of_the_summary_are_those_of_the_last_record(tmp_path: Path) -> None:
    """A run that selects all tokens at its end has no unselected ones there."""
    run = make_run(tmp_path / "run", [record(1), record(2, loss_unselected=None, loss=3.25)])
    assert captured([str(run)], report_main).code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "training loss, selected</th><td>3.2500</td>" in page and "training loss, unselected</th>" not in page


@pytest.mark.parametrize(
    ("score", "shown"),
    [("excess", "slm, excess, k = 0.6, data-parallel"), ("excess:0.7", "slm, excess:0.7, data-parallel")],
)
def test_the_ratio_is_shown_if_the_score_uses_it(score: str, shown: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(1)], **SLM, slm_score=score)
    assert captured([str(run)], report_main).code == 0
    assert f"<td>{shown}</td>" in (run / "report.html").read_text(encoding="utf-8")


def test_metrics_of_earlier_starts_have_different_names_and_no_events(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(1)])
    (run / "events.jsonl").write_text(json.dumps(SPIKE) + "\n")
    for number in (1, 2):
        (run / f"metrics.jsonl.{number}").write_text(json.dumps(record(number)) + "\n")
    other = make_run(tmp_path / "other", [record(1)])
    (other / "metrics.jsonl").rename(other / "metrics.jsonl.1")
    runs = read_runs([str(run), *(f"{each}/metrics.jsonl.{n}" for each, n in ((run, 1), (run, 2), (other, 1)))])
    assert [each.name for each in runs] == [
        "run",
        f"{run}/metrics.jsonl.1",
        "metrics.jsonl.2",
        f"{other}/metrics.jsonl.1",
    ]
    assert [len(each.events) for each in runs] == [1, 0, 0, 0]


def test_a_run_without_metrics_is_as_far_as_its_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], **{**SLM, "train_iters": 2})
    (run / "metrics.jsonl").unlink()
    assert captured([str(run)], report_main).code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "2 of 2 (complete)" in page and "Curves</h2><p>none yet</p>" in page


def test_evaluations_without_a_set_are_no_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [{"kind": "eval", "step": 1, "tokens": 64, "loss": 3.0}, record(1)])
    result = captured([str(run), "--output", str(tmp_path / "p.svg"), "--metrics", "eval/loss"], plot_main)
    assert result.code == 2 and "no run has this metric" in result.errors and "eval/loss," not in result.errors


def test_metrics_are_plotted_by_name(tmp_path: Path) -> None:
    runs = [
        str(make_run(tmp_path / name, [held_out(0, 6.0), *map(record, range(1, 4)), held_out(3, 5.0)], **SLM))
        for name in ("one", "two")
    ]
    output = tmp_path / "plot.svg"
    flags = ["--output", str(output), "--metrics", "loss", "eval/loss", "--x", "tokens", "--smoothing", "0.5"]
    result = captured([*runs, *flags], plot_main)
    assert result.code == 0 and "</svg>" in output.read_text(), result.errors
    assert captured([*runs, *flags], plot_main).code == 0  # replaces its own file
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG of a camera")
    for flags, message in (
        (["--output", "x.gif"], "the format is not known by its suffix"),
        (["--output", str(photo)], "was not written by megatron_slm"),
        (["--output", str(tmp_path / "no" / "plot.png")], "does not exist. Create it"),
        (["--output", str(output), "--metrics", "los"], "no run has this metric. Did you mean loss?"),
        (["--output", str(output), "--smoothing", "1"], "must be at least 0 and below 1"),
    ):
        result = captured([*runs, *flags], plot_main)
        assert result.code == 2 and message in result.errors, result


def test_runs_without_training_metrics_are_plotted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [{"kind": "task", "step": 0, "tokens": 0, "set": "gsm8k", "accuracy": 0.5}])
    result = captured([str(run), "--output", str(tmp_path / "plot.svg")], plot_main)
    assert result.code == 0 and (tmp_path / "plot.svg").exists(), result.errors


def test_legends_have_the_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib hides labels with a leading underscore, reads text between dollar signs, and refuses surrogates."""
    runs = [str(make_run(tmp_path / name, [record(1), record(2)])) for name in ("_first", "a$b$")]
    monkeypatch.chdir(make_run(tmp_path / "c\udce9", [record(1)]))
    with plt.rc_context({"svg.fonttype": "none"}):
        result = captured([*runs, ".", "--output", str(tmp_path / "p.svg"), "--metrics", "loss"], plot_main)
    assert result.code == 0, result.errors
    plot = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert "_first" in plot and "a$b$" in plot and "c?" in plot


def test_more_runs_than_colors_are_distinguished(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / str(number), [record(1), record(2)])) for number in range(8)]
    result = captured([*runs, "--output", str(tmp_path / "p.svg"), "--metrics", "loss"], plot_main)
    assert result.code == 0 and (tmp_path / "p.svg").read_text().count("stroke-dasharray: 5.18") == 4, "lines and keys"


def test_control_characters_of_names_are_not_in_a_plot(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / name, [record(1)])) for name in ("\x1b[31m", "a\nb")]
    assert captured([*runs, "--output", str(tmp_path / "p.svg"), "--metrics", "loss"], plot_main).code == 0
    ElementTree.parse(tmp_path / "p.svg")  # an escape is not well-formed


def test_events_between_logged_steps_are_marked_at_their_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(step) for step in (10, 20)])
    (run / "events.jsonl").write_text(json.dumps({**SPIKE, "step": 15}) + "\n")
    for axis in ("steps", "tokens"):
        assert captured([str(run), "--x", axis], report_main).code == 0
        marks = re.findall(r'class="mark" d="M([\d.]+) ', (run / "report.html").read_text(encoding="utf-8"))
        assert [float(mark) for mark in marks] == [(BOX[0] + BOX[1]) / 2] * 2, axis


@pytest.mark.parametrize(("axis", "at"), [("steps", 5), ("tokens", 5 * 64)])
def test_an_event_outside_of_the_logged_steps_is_on_the_chart(axis: str, at: int, tmp_path: Path) -> None:
    """A NaN ends the run before its step is logged."""
    run = make_run(tmp_path / "run", [record(step) for step in (2, 4)])
    (run / "events.jsonl").write_text("".join(json.dumps({**SPIKE, "step": step}) + "\n" for step in (1, 5)))
    assert captured([str(run), "--x", axis], report_main).code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    marks = re.findall(r'class="mark" d="M([\d.]+) ', page)
    assert [float(mark) for mark in marks] == [BOX[0], BOX[1]] * 2
    assert json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])["charts"][0]["x"] == [at / 5, at]


def test_long_and_foreign_names_leave_room_for_the_curves(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / name, [record(1), record(2)])) for name in ("L" * 200, "日本 \U0001f600")]
    result = captured([*runs, "--output", str(tmp_path / "p.png"), "--metrics", "loss"], plot_main)
    assert result.code == 0 and result.errors.count("\n") == 1 and "lacks characters" in result.errors, result.errors


def test_long_lines_keep_their_extremes() -> None:
    values = [1.0] * 2000
    values[777], values[1500] = 9.0, math.nan
    points = reduce_points(Line("loss", list(range(2000)), values), 100)
    assert len(points.x) == 100 and max(points.high) == 9.0 and points.x[-1] == 1999
    figure, data = draw_chart(Chart("<loss>", [Line("a", list(range(2000)), values)], "steps"))
    assert "&lt;loss&gt;" in figure and 'class="band c0"' in figure and data["lines"][0]["x"][-1] == 1999


def test_values_that_are_nan_or_huge_are_reduced() -> None:
    points = reduce_points(Line("loss", range(6), [math.nan, math.nan, 1e308, 1.7e308, 2.0, math.nan]), 3)
    assert points.x == [1, 3, 5] and math.isnan(points.y[0]) and points.y[1:] == [1.7e308, 2.0]
    assert points.is_reduced and not reduce_points(Line("loss", [1, 2], [math.nan, 3.0])).is_reduced
    assert reduce_points(Line("loss", [], [])).x == []


def test_the_last_record_of_a_repeated_step_counts() -> None:
    records = [record(1), record(3, lr=0.3), record(2, lr=0.2), record(3, lr=None), record(2, lr=0.4), record(2**70)]
    metrics = Metrics([*records, {"kind": "eval", "step": 4, "tokens": 2**70, "set": None, "loss": 5}])
    series = metrics.series("lr", "train", None)
    assert (series.steps.tolist(), series.tokens.tolist(), series.values.tolist()) == ([1, 2], [64, 128], [1e-3, 0.4])
    assert metrics.series("loss", "train", None).steps.tolist() == [1, 2, 3]
    assert (metrics.step, metrics.tokens, metrics.sets("eval")) == (4, 0, [])


def test_charts_of_few_values() -> None:
    assert "no values" in draw_chart(Chart("empty", [Line("a", [1], [math.nan])], "steps"))[0]
    for x, y in (([1], [2.0]), ([1, 2, 3], [0.0, math.nan, 0.0]), ([5, 5], [1e-12, -1e12])):
        figure, data = draw_chart(Chart("few", [Line("a", x, y)], "steps"))
        assert "nan" not in figure and len(data["lines"][0]["y"]) == len(x)


def test_a_run_has_one_color_in_all_charts() -> None:
    """Also in a chart in which another run has no values."""
    figure, data = draw_chart(Chart("threshold", [Line("clm", [1], [math.nan]), Line("slm", [1], [2.0])], "steps"))
    assert 'class="key c1"' in figure and 'c0"' not in figure and data["lines"][0]["number"] == 1


def test_ticks_are_round_numbers() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(4.93, 5.71) == [5, 5.2, 5.4, 5.6] and ticks(0, 3e-14) == [0, 1e-14, 2e-14, 3e-14]
    assert [short_number(value) for value in (0, 2e-5, -0.5, 9500, 40_000, 2.5e6)] == [
        *("0", "2e−05", "−0.5", "9500", "40k", "2.5M")
    ]


def test_tick_labels_differ() -> None:
    assert tick_labels([3.21, 3.2102, 3.2104]) == ["3.21", "3.2102", "3.2104"]
    assert tick_labels([100_000, 100_010, 100_020]) == ["100k", "100.01k", "100.02k"]
    assert tick_labels([0, 0.5, 1]) == ["0", "0.5", "1"]


def test_smoothing_starts_at_the_first_value_and_skips_nan() -> None:
    assert np.allclose(smooth(np.array([2.0, 2.0, np.nan, 2.0]), 0.9), [2, 2, np.nan, 2], equal_nan=True)
