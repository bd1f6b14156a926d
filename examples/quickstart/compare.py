"""Objectives, engines and scopes from the quickstart's base and reference model, three seeds: ``make compare``.

Objectives and engines are runs of one process, two side by side, which on two cores gives more tokens a second than one
run of two. Scopes have two ranks with half the micro-batch, so that each scope selects among another number of tokens.
Every finished run is kept: calling this again goes on where it was stopped.
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
STEPS, SCOPE_STEPS = 160, 80
SEEDS = (1, 2, 3)
SLM = ("--objective", "slm", "--slm-selection-ratio", "0.6")


@dataclass(frozen=True)
class Variant:
    """Something to compare: flags, whether a reference model is needed, the ranks and the steps of a run."""

    flags: Sequence[str]
    has_reference: bool = True
    ranks: int = 1
    steps: int = STEPS


OBJECTIVES = {
    "CLM": Variant(("--objective", "clm"), has_reference=False),
    "SLM": Variant(SLM),
    "random": Variant((*SLM, "--slm-score", "random"), has_reference=False),
}
RECOMPUTE = (*SLM, "--slm-saved-logits-mb", "0")  # logits of this size are kept otherwise, whatever the mode
ENGINES = {
    "SLM": OBJECTIVES["SLM"],
    "SLM, engine torch": Variant((*SLM, "--slm-cross-entropy", "torch")),
    "SLM, recompute": Variant(RECOMPUTE),
    "SLM, speculative": Variant((*RECOMPUTE, "--slm-exact-mode", "speculative")),
}
SCOPES = {
    f"SLM, {scope}": Variant((*SLM, "--micro-batch-size", "4", "--slm-scope", scope), ranks=2, steps=SCOPE_STEPS)
    for scope in ("micro-batch", "data-parallel", "global-batch")
}
SCOPES["SLM, global-batch, predicted"] = replace(
    SCOPES["SLM, global-batch"], flags=(*SCOPES["SLM, global-batch"].flags, "--slm-threshold", "predicted")
)


def main() -> int:
    os.chdir(stages.ROOT)
    folder = stages.FOLDER
    try:
        load_base = stages.prepare_base_and_reference(folder)
        train_all(folder, load_base, OBJECTIVES | ENGINES)
        train_all(folder, load_base, SCOPES)
    except stages.StageFailed as failure:
        return failure.code
    report(folder)
    return 0


def train_all(folder: Path, load_base: list[str], variants: dict[str, Variant]) -> None:
    """Every variant with every seed, as many runs at a time as two cores have ranks."""
    runs = [(name, seed) for seed in SEEDS for name in variants]
    at_once = 2 // max(variant.ranks for variant in variants.values())
    with progress("comparison", len(runs), "runs") as bar, ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(lambda run: train_one(folder, load_base, variants[run[0]], *run), runs):
            bar.advance()


def folder_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"compare-{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def train_one(folder: Path, load_base: list[str], variant: Variant, name: str, seed: int) -> None:
    """One run; its lines go to a file."""
    run = folder_of(folder, name, seed)
    flags = [*load_base, *variant.flags, "--seed", str(seed), "--train-iters", str(variant.steps)]
    flags += ["--eval-interval", str(variant.steps // 8), "--eval-iters", "8"]
    if variant.has_reference:
        flags += ["--reference-load", str(folder / "rm")]
    command = stages.training_command(folder, run.name, "raw_train", flags, processes=variant.ranks)
    log = run.with_suffix(".log")
    settings = [*command[1:], stages.MODEL.read_text(encoding="utf-8")]
    began = time.monotonic()
    stages.stage(f"train {run.name}", run, settings, lambda: stages.run_with_log(command, log))
    print(f"   {run.name}: {format_duration(time.monotonic() - began)}, log in {log}", flush=True)


def report(folder: Path) -> None:
    """Write the result file and the plot, and print tables and findings."""
    curves = curves_of(folder, OBJECTIVES | ENGINES | SCOPES)
    objectives, engines, scopes = (
        [curve for curve in curves if curve.objective in variants] for variants in (OBJECTIVES, ENGINES, SCOPES)
    )
    RESULTS.mkdir(exist_ok=True)
    settings = {
        "base_steps": stages.BASE_STEPS,
        "reference_steps": stages.REFERENCE_STEPS,
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
            comparison_table(scopes),
            paired_differences(scopes, "SLM, data-parallel"),
        )
    )
    write_text(RESULTS / "compare.md", f"{text}\n")
    shutil.copy(RESULTS / "compare.png", folder / "compare.png")
    print(f"{text}\nresult, tables and plot: {RESULTS}")


def curves_of(folder: Path, variants: Iterable[str]) -> list[Curve]:
    return [
        Curve(name, seed, held_out, *stages.held_out_losses(folder_of(folder, name, seed), held_out))
        for name in variants
        for seed in SEEDS
        for held_out in ("clean", "raw")
    ]


if __name__ == "__main__":
    sys.exit(main())
