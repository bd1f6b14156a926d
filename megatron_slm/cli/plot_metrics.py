"""Plot metrics of one or more runs as PNG, SVG or PDF."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.output import print_summary
from megatron_slm.runtime.reporting import run_tool

if TYPE_CHECKING:
    from megatron_slm.analysis.run_files import RunFiles

OUTPUT = "--output"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", type=expand_user, nargs="+", metavar="RUN", help="--save directory of a run, or its metrics file")
    add(OUTPUT, type=expand_user, required=True, metavar="FILE", help="output file; its suffix is the format")
    add(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="metrics, as in metrics.jsonl: loss, eval/loss of all validation sets, eval/SET/loss of one, task/NAME; "
        "default the losses, grad_norm, lr, share_selected and threshold, or all of runs without these",
    )
    add("--x", choices=("steps", "tokens"), default="steps", help="x axis")
    add(
        "--smoothing",
        type=float,
        default=0.0,
        metavar="W",
        help="weight of the previous mean in an exponential moving average, in [0, 1); raw values stay visible",
    )
    arguments = parse_strictly(parser, argv, {})
    if not 0 <= arguments.smoothing < 1:
        raise ConfigError(f"--smoothing is {arguments.smoothing}, and must be at least 0 and below 1.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_tool(lambda: plot(parse_arguments(sys.argv[1:] if argv is None else argv)))


def plot(arguments: argparse.Namespace) -> None:
    """Plot the metrics of the command line."""
    from megatron_slm.analysis.metrics_plot import check_plot, plot_metrics
    from megatron_slm.analysis.run_files import read_runs

    check_plot(arguments.output, OUTPUT)
    runs = read_runs(arguments.runs)
    metrics = chosen_metrics(runs, arguments.metrics)
    plot_metrics(runs, metrics, arguments.output, axis=arguments.x, smoothing=arguments.smoothing, role=OUTPUT)
    print_summary(f"wrote {arguments.output}")


def chosen_metrics(runs: Sequence[RunFiles], names: Sequence[str] | None) -> list[str]:
    """Return the metrics to plot.

    Raises:
        ConfigError: no run has a metric of this name, or any metric.
    """
    from megatron_slm.analysis.metrics_plot import DEFAULT_METRICS, Metric, known_metrics

    known = known_metrics(runs)
    present = [name for name in names or DEFAULT_METRICS if any(Metric.parse(name).lines(run) for run in runs)]
    if not known:
        raise ConfigError(f"{', '.join(str(run.metrics) for run in runs)}: no metrics yet. Wait for the first step.")
    for name in names or ():
        if name not in present:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise ConfigError(f"--metrics {name}: no run has this metric. {hint}They have {', '.join(known)}.")
    return present or known
