"""CLM, SLM and random selection from the quickstart's base and reference model, three seeds: ``make compare``.

Two runs of one process go side by side, which on two cores gives more tokens a second than one run of two. Every
finished run is kept: calling this again goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import stages

from megatron_slm.analysis.curves import Curve, plot_comparison
from megatron_slm.analysis.summary import comparison_table, speedup
from megatron_slm.runtime.console import duration, progress

RESULTS = stages.HERE / "results"
STEPS = 160
SEEDS = (1, 2, 3)
OBJECTIVES = {
    "CLM": ("--objective", "clm"),
    "SLM": ("--objective", "slm", "--slm-selection-ratio", "0.6"),
    "random": ("--objective", "slm", "--slm-selection-ratio", "0.6", "--slm-score", "random"),
}


def main() -> int:
    os.chdir(stages.ROOT)
    folder = stages.FOLDER
    try:
        load_base = stages.prepare_base_and_reference(folder)
        train_all(folder, load_base)
    except stages.StageFailed as failure:
        return failure.code
    report(folder)
    return 0


def train_all(folder: Path, load_base: list[str]) -> None:
    """Every objective with every seed, two at a time."""
    runs = [(name, seed) for seed in SEEDS for name in OBJECTIVES]
    with progress("comparison", len(runs), "runs") as bar, ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda run: train_one(folder, load_base, *run), runs):
            bar.advance()


def train_one(folder: Path, load_base: list[str], objective: str, seed: int) -> None:
    """One run of one process; its lines go to a file."""
    name = f"compare-{objective}-{seed}"
    flags = [*load_base, *OBJECTIVES[objective], "--seed", str(seed), "--train-iters", str(STEPS)]
    flags += ["--eval-interval", str(STEPS // 8), "--eval-iters", "8"]
    if objective == "SLM":
        flags += ["--reference-load", str(folder / "rm")]
    command = stages.training_command(folder, name, "raw_train", flags, processes=1)
    log = folder / f"{name}.log"

    def work() -> None:
        with log.open("w", encoding="utf-8") as file:
            stages.run(command, env=stages.single_threaded(), stdout=file, stderr=file)

    settings = [*command[1:], stages.MODEL.read_text(encoding="utf-8")]
    began = time.monotonic()
    stages.stage(f"train {name}", folder / name, settings, work)
    print(f"   {name}: {duration(time.monotonic() - began)}, log in {log}", flush=True)


def report(folder: Path) -> None:
    """Write the result file and the plot, and print table and findings."""
    curves = [
        Curve(objective, seed, held_out, *points(folder / f"compare-{objective}-{seed}", held_out))
        for objective in OBJECTIVES
        for seed in SEEDS
        for held_out in ("clean", "raw")
    ]
    RESULTS.mkdir(exist_ok=True)
    settings = {"base_steps": stages.BASE_STEPS, "reference_steps": stages.REFERENCE_STEPS, "steps": STEPS}
    (RESULTS / "compare.json").write_text(
        json.dumps({"settings": settings, "curves": [vars(curve) for curve in curves]}, indent=1) + "\n",
        encoding="utf-8",
    )
    plot_comparison(curves, RESULTS / "compare.png")
    table = comparison_table(curves)
    (RESULTS / "compare.md").write_text(f"{table}\n\n{speedup(curves, 'SLM', 'CLM')}\n", encoding="utf-8")
    shutil.copy(RESULTS / "compare.png", folder / "compare.png")
    print(f"{table}\n\n{speedup(curves, 'SLM', 'CLM')}\nresult, table and plot: {RESULTS}")


def points(folder: Path, held_out: str) -> tuple[list[int], list[float]]:
    """Tokens and held-out loss of one run."""
    records = [record for record in stages.read_metrics(folder, "eval") if record["set"] == held_out]
    return [int(str(record["tokens"])) for record in records], [float(str(record["loss"])) for record in records]


if __name__ == "__main__":
    sys.exit(main())
