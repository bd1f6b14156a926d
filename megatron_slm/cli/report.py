"""Write an HTML report of a run, or a comparison of several, from the files in their --save directories.

Works on active, interrupted and resumed runs. The page needs no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.output import print_summary
from megatron_slm.runtime.reporting import run_tool

if TYPE_CHECKING:
    from megatron_slm.analysis.run_files import RunFiles

DEFAULT = "report.html"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", type=expand_user, nargs="+", metavar="RUN", help="--save directory of a run, or its metrics file")
    add("--html", type=expand_user, metavar="FILE", help=f"output file; default {DEFAULT} in the first directory")
    add("--x", choices=("steps", "tokens"), help="x axis of the curves; default steps, for several runs tokens")
    return parse_strictly(parser, argv, {})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_tool(lambda: report(parse_arguments(sys.argv[1:] if argv is None else argv)))


def report(arguments: argparse.Namespace) -> None:
    """Write the report of the command line."""
    from megatron_slm.analysis.page import check_page
    from megatron_slm.analysis.report_page import NAME, write_report
    from megatron_slm.analysis.run_files import read_runs

    runs = read_runs(arguments.runs)
    first = Path(arguments.runs[0])
    path = arguments.html or str((first if first.is_dir() else first.parent) / DEFAULT)
    check_page(path, NAME)
    axis = arguments.x or ("tokens" if len(runs) > 1 else "steps")
    objectives = {run.name: describe_objective(run) for run in runs}
    write_report(runs, path, axis=axis, objectives=objectives, usage={run.name: corpus_shares(run) for run in runs})
    print_summary(f"wrote {path}")


def describe_objective(run: RunFiles) -> str:
    """Return the objective of a run, with the ratio k if its score uses it."""
    from megatron_slm.objective.selection.policy import has_own_ratios, parse_policy

    name, score, ratio, scope = map(run.settings.get, ("objective", "slm_score", "slm_selection_ratio", "slm_scope"))
    if name != "slm":
        return str(name or "")
    try:
        uses_ratio = not has_own_ratios(parse_policy(str(score)))
    except ConfigError:
        uses_ratio = True
    return f"slm, {score}, {f'k = {ratio}, ' if uses_ratio else ''}{scope}"


def corpus_shares(run: RunFiles) -> list[tuple[str, float | None]]:
    """Return the training corpora of a run with their shares of its samples, None if these depend on their sizes."""
    from megatron_slm.data.blends import normalized_weights, parse_blend

    arguments = run.settings.get("train_data_path") or run.settings.get("data_path")
    try:
        blend = parse_blend(list(map(str, arguments)) if isinstance(arguments, list) else [])
    except ConfigError:
        return []
    weights = normalized_weights(blend)
    return [(blend[0][0], 1.0)] if len(blend[0]) == 1 else list(zip(blend[0], weights, strict=True))
