"""Compare objectives, engines and scopes from one base and one reference model: ``make compare``.

Each variant runs with three seeds. Objectives and engines are single-process runs, two in parallel, which is faster on
two cores than one run of two processes. Scopes use two ranks with half the micro-batch, so that each scope ranks a
different number of tokens. Re-running continues with unfinished runs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import stages

from megatron_slm.analysis.curves import Curve, plot_comparison
from megatron_slm.analysis.summary import comparison_table, paired_differences, speedup
from megatron_slm.runtime.console import format_duration, progress
from megatron_slm.runtime.files import write_text

RESULTS = stages.HERE / "results"
BASE, REFERENCE = "compare-base", "compare-rm"
BASE_STEPS, STEPS, SCOPE_STEPS = 100, 160, 80
REFERENCE_STEPS = 1242  # three passes over the clean corpus (section 3.1): 3 x 1,695,344 tokens / 4,096
SEEDS = (1, 2, 3)
SLM = ("--objective", "slm", "--slm-selection-ratio", "0.6")


@dataclass(frozen=True)
class Variant:
    """Represent a compared variant: its flags, reference model, ranks and steps."""

    flags: Sequence[str]
    has_reference: bool = True
    ranks: int = 1
    steps: int = STEPS


OBJECTIVES = {
    "CLM": Variant(("--objective", "clm"), has_reference=False),
    "SLM": Variant(SLM),
    "random": Variant((*SLM, "--slm-score", "random"), has_reference=False),
}
RECOMPUTE = (*SLM, "--slm-saved-logits-mb", "0")  # otherwise logits of this size are saved in every mode
ENGINES = {
    "SLM": OBJECTIVES["SLM"],
    "SLM, engine torch": Variant((*SLM, "--slm-cross-entropy", "torch")),
    "SLM, recompute": Variant(RECOMPUTE),
    "SLM, speculative": Variant((*RECOMPUTE, "--slm-exact-mode", "speculative")),
}
FILTERED = {"SLM": OBJECTIVES["SLM"], "SLM, filtered": Variant((*SLM, "--slm-backward", "filtered"))}
SCOPES = {
    f"SLM, {scope}": Variant((*SLM, "--micro-batch-size", "4", "--slm-scope", scope), ranks=2, steps=SCOPE_STEPS)
    for scope in ("micro-batch", "data-parallel", "global-batch")
}
SCOPES["SLM, global-batch, predicted"] = replace(
    SCOPES["SLM, global-batch"], flags=(*SCOPES["SLM, global-batch"].flags, "--slm-threshold", "predicted")
)


def main() -> int:
    os.chdir(stages.ROOT)
    directory = stages.FOLDER
    try:
        load_base = stages.prepare_base_and_reference(directory, BASE, REFERENCE, BASE_STEPS, REFERENCE_STEPS)
        train_all(directory, load_base, OBJECTIVES | ENGINES | FILTERED)
        train_all(directory, load_base, SCOPES)
    except stages.StageFailed as failure:
        return failure.code
    report(directory)
    return 0


def train_all(directory: Path, load_base: list[str], variants: dict[str, Variant]) -> None:
    """Train every variant with every seed, with at most two ranks in parallel."""
    runs = [(name, seed) for seed in SEEDS for name in variants]
    parallel_runs = 2 // max(variant.ranks for variant in variants.values())
    with progress("comparison", len(runs), "runs") as bar, ThreadPoolExecutor(parallel_runs) as pool:
        for _ in pool.map(lambda run: train_one(directory, load_base, variants[run[0]], *run), runs):
            bar.advance()


def run_directory(directory: Path, name: str, seed: int) -> Path:
    return directory / f"compare-{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def train_one(directory: Path, load_base: list[str], variant: Variant, name: str, seed: int) -> None:
    """Train one run, with its output in a log file."""
    run = run_directory(directory, name, seed)
    flags = [*load_base, *variant.flags, "--seed", str(seed), "--train-iters", str(variant.steps)]
    flags += ["--eval-interval", str(variant.steps // 8), "--eval-iters", "8"]
    if variant.has_reference:
        flags += ["--reference-load", str(directory / REFERENCE)]
    command = stages.training_command(directory, run.name, "raw_train", flags, processes=variant.ranks)
    log = run.with_suffix(".log")
    settings = [*command[1:], stages.MODEL.read_text(encoding="utf-8")]
    start = time.monotonic()
    stages.stage(f"train {run.name}", run, settings, lambda: stages.run_with_log(command, log))
    print(f"   {run.name}: {format_duration(time.monotonic() - start)}, log in {log}", flush=True)


def report(directory: Path) -> None:
    """Write the results and the plot, and print tables and findings."""
    curves = held_out_curves(directory, OBJECTIVES | ENGINES | FILTERED | SCOPES)
    objectives, engines, filtered, scopes = (
        [curve for curve in curves if curve.objective in variants]
        for variants in (OBJECTIVES, ENGINES, FILTERED, SCOPES)
    )
    RESULTS.mkdir(exist_ok=True)
    settings = {
        "base_steps": BASE_STEPS,
        "reference_steps": REFERENCE_STEPS,
        "steps": STEPS,
        "scope_steps": SCOPE_STEPS,
    }
    report = {"settings": settings, "curves": [vars(curve) for curve in curves]}
    write_text(RESULTS / "compare.json", json.dumps(report, indent=1) + "\n")
    plot_comparison(objectives, RESULTS / "compare.png")
    text = "\n\n".join(
        (
            comparison_table(objectives),
            speedup(objectives, "SLM", "CLM"),
            comparison_table(engines),
            paired_differences(engines, "SLM"),
            comparison_table(filtered),
            paired_differences(filtered, "SLM"),
            comparison_table(scopes),
            paired_differences(scopes, "SLM, data-parallel"),
        )
    )
    write_text(RESULTS / "compare.md", f"{text}\n")
    shutil.copy(RESULTS / "compare.png", directory / "compare.png")
    print(f"{text}\nresult, tables and plot: {RESULTS}")


def held_out_curves(directory: Path, variants: Iterable[str]) -> list[Curve]:
    return [
        Curve(name, seed, held_out, *stages.held_out_losses(run_directory(directory, name, seed), held_out))
        for name in variants
        for seed in SEEDS
        for held_out in ("clean", "raw")
    ]


if __name__ == "__main__":
    sys.exit(main())
