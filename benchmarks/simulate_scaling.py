"""Simulate step times and the overhead of the selection on up to 16,384 ranks.

    python benchmarks/simulate_scaling.py --ranks 1024 16384

Times of ranks, stalls and latencies are assumptions (flags), not measurements. The same seed gives the same result.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_slm.planning.simulation import SCOPES, Cluster, expected_straggling, simulate
from megatron_slm.runtime.files import write_text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1024, 16384], help="numbers of ranks")
    add("--model-parallel", type=int, default=8, help="ranks that share a replica of the model")
    add("--micro-batches", type=int, default=8, help="micro-batches per step")
    add("--micro-batch-seconds", type=float, default=0.5, help="mean time of a micro-batch")
    add("--jitter", type=float, default=0.01, help="relative standard deviation of a micro-batch's time")
    add("--stall-probability", type=float, default=1e-6, help="probability that a rank stalls in a micro-batch")
    add("--stall-seconds", type=float, default=0.5, help="duration of a stall")
    add("--slow-share", type=float, default=0.0, help="share of permanently slower ranks")
    add("--slow-factor", type=float, default=1.1, help="their relative time")
    add("--hop-microseconds", type=float, default=5.0, help="mean latency of a message")
    add("--steps", type=int, default=100, help="simulated steps")
    add("--seed", type=int, default=0, help="random seed")
    add("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    base = Cluster(
        ranks=1,
        model_parallel=arguments.model_parallel,
        micro_batches=arguments.micro_batches,
        micro_batch_seconds=arguments.micro_batch_seconds,
        jitter=arguments.jitter,
        stall_probability=arguments.stall_probability,
        stall_seconds=arguments.stall_seconds,
        slow_share=arguments.slow_share,
        slow_factor=arguments.slow_factor,
        hop_seconds=1e-6 * arguments.hop_microseconds,
    )
    table = Table("ranks", "--slm-scope", "step, s", "99 %, s", "waiting", "all-reduces", "selection", box=None)
    results = []
    for ranks in arguments.ranks:
        cluster = replace(base, ranks=ranks)
        for scope in SCOPES:
            found = simulate(cluster, scope, arguments.steps, arguments.seed)
            row = {
                "ranks": ranks,
                "scope": scope,
                "step": float(found.steps.mean()),
                "step_99": float(np.quantile(found.steps, 0.99)),
                "waiting": found.straggling,
                "waiting_by_jitter": expected_straggling(cluster),
                "allreduce_seconds": float(found.collectives.mean()),
                "selection_overhead": found.overhead,
            }
            results.append(row)
            table.add_row(
                f"{ranks:,}",
                scope,
                f"{row['step']:.3f}",
                f"{row['step_99']:.3f}",
                f"{100 * found.straggling:.2f} %",
                f"{1000 * found.collectives.mean():.2f} ms",
                f"{100 * found.overhead:+.2f} %",
            )
    Console().print(table)
    if arguments.output is not None:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        write_text(arguments.output, json.dumps({"settings": settings, "results": results}, indent=1))


if __name__ == "__main__":
    main()
