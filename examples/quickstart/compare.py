"""Train the variants of studies with three seeds, and write tables and plots: ``make compare``.

``python examples/quickstart/compare.py STUDY ...`` runs other studies of ``studies.py``; ``--seeds 1 2`` trains fewer
seeds, and adds them to the table of those that were run before, on this machine or on another; the table says if the
corpora differ. Runs of one rank are trained two in parallel, or ``--parallel N``, which is faster on two cores than one
run of two processes. Scopes use two ranks with half the micro-batch, so that each scope ranks a different number of
tokens. Re-running continues with unfinished runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import stages
from studies import BASE, BASE_STEPS, COMPARISON, RATIO, REFERENCES, STUDIES, Study, Variant
from study_corpora import prepare

from megatron_slm.analysis.curves import Curve, plot_comparison, plot_trade_off, write_curves
from megatron_slm.analysis.summary import comparison_table, speedup
from megatron_slm.runtime.console import format_duration, progress
from megatron_slm.runtime.files import write_text

RESULTS = stages.HERE / "results"
SEEDS = (1, 2, 3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run studies, and write their tables and plots.")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; default make compare's")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED", help="default 1 2 3")
    parser.add_argument("--parallel", type=int, default=2, metavar="N", help="runs of one rank to train in parallel")
    arguments = parser.parse_args(argv)
    names, seeds = arguments.studies or COMPARISON, sorted(set(arguments.seeds))
    if unknown := sorted(set(names) - set(STUDIES)):
        parser.error(f"unknown study {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    if min(arguments.parallel, *seeds) < 1:
        parser.error("--parallel and --seeds must be at least 1")
    os.chdir(stages.ROOT)
    return stages.run_example(stages.FOLDER, lambda: run_studies(names, seeds, arguments.parallel))


def run_studies(names: Sequence[str], seeds: Sequence[int], parallel: int) -> None:
    """Train what the studies lack, and write their tables and plots."""
    directory = stages.FOLDER
    variants = {name: variant for study in names for name, variant in STUDIES[study].variants.items()}
    train_all(directory, variants, seeds, parallel)
    for name in names:
        report(directory, name, STUDIES[name], seeds, RESULTS)
    print(f"tables and plots: {RESULTS}")


def train_all(directory: Path, variants: dict[str, Variant], seeds: Sequence[int], parallel: int) -> None:
    """Train the base, the reference models and every variant with every seed, ``parallel`` runs of one rank."""
    stages.prepare_data(directory)
    stages.train(directory, BASE, "raw_train", ["--train-iters", str(BASE_STEPS)])
    for name in dict.fromkeys(variant.reference for variant in variants.values() if variant.reference):
        train_reference(directory, name)
    corpora = (name for variant in variants.values() for name in stages.blend_corpora(variant.blend))
    prepare(directory, corpora, RATIO)
    runs = sorted(((seed, name) for seed in seeds for name in variants), key=lambda run: variants[run[1]].ranks)
    single = sum(variants[name].ranks == 1 for _, name in runs)
    with progress("runs", len(runs), "runs") as bar:
        for chosen, parallel_runs in ((runs[:single], parallel), (runs[single:], 1)):
            with ThreadPoolExecutor(parallel_runs) as pool:
                for _ in pool.map(lambda run: train_one(directory, run[1], variants[run[1]], run[0]), chosen):
                    bar.advance()


def train_reference(directory: Path, name: str) -> None:
    """Train a reference model from the base, or from a base of its own size."""
    reference, base = REFERENCES[name], BASE
    if reference.flags:
        base = f"{name}-base"
        stages.train(directory, base, "raw_train", ["--train-iters", str(BASE_STEPS), *reference.flags])
    flags = ["--train-iters", str(reference.steps), *load(directory, base), *reference.flags]
    stages.train(directory, name, reference.corpus, flags, [base])


def load(directory: Path, base: str) -> list[str]:
    return ["--load", str(directory / base), "--finetune"]


def run_directory(directory: Path, name: str, seed: int) -> Path:
    return directory / f"compare-{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def train_one(directory: Path, name: str, variant: Variant, seed: int) -> None:
    """Train one run, with its output in a log file."""
    run = run_directory(directory, name, seed)
    flags = [*load(directory, BASE), *variant.flags, "--seed", str(seed), "--train-iters", str(variant.steps)]
    flags += ["--eval-interval", str(variant.steps // 8), "--eval-iters", "8"]
    if variant.reference:
        flags += ["--reference-load", str(directory / variant.reference)]
    command = stages.training_command(directory, run.name, variant.blend, flags, processes=variant.ranks)
    log = run.with_name(f"{run.name}.log")
    settings = [*command, stages.MODEL.read_text(encoding="utf-8")]
    start = time.monotonic()
    models = [BASE, *([variant.reference] if variant.reference else ())]
    inputs = stages.training_inputs(directory, stages.blend_corpora(variant.blend), models)
    stages.stage(f"train {run.name}", run, settings, lambda: stages.run_with_log(command, log), inputs)
    print(f"   {run.name}: {format_duration(time.monotonic() - start)}, log in {log}", flush=True)


def report(directory: Path, name: str, study: Study, seeds: Sequence[int], results: Path) -> None:
    """Write the curves, the table and the plot of a study to ``results``, and print the table."""
    results.mkdir(parents=True, exist_ok=True)
    path, order = results / f"{name}.json", list(study.variants)
    curves = held_out_curves(directory, study.variants, seeds)
    curves += recorded_curves(path, study, curves)
    curves.sort(key=lambda curve: (order.index(curve.variant), curve.seed, curve.held_out))
    write_curves(curves, path)
    curves = read_curves(path)  # rounded, so that the table is that of the file
    text = comparison_table(curves, study.baseline)
    pairs = [(name.replace("CLM", "SLM"), name) for name in study.variants if name.startswith("CLM")]
    text += "".join(f"\n\n{speedup(curves, slm, clm)}" for slm, clm in pairs if slm in study.variants)
    if len({curve.seed for curve in curves}) < len(SEEDS) or len({curve.corpora for curve in curves}) > 1:
        text += f"\n\n{seeds_and_corpora(curves)}"
    write_text(results / f"{name}.md", f"{text}\n")
    print(f"\n{name}\n\n{text}")
    if study.plot == "curves":
        plot_comparison(curves, results / f"{name}.png")
    elif study.plot == "trade-off":
        plot_trade_off(curves, study.baseline, results / f"{name}.png")


def seeds_and_corpora(curves: Sequence[Curve]) -> str:
    """Return the seeds of a table, by corpora: those of another machine are built from other packages."""
    seeds: dict[str, set[int]] = {}
    for curve in sorted(curves, key=lambda curve: curve.seed):
        seeds.setdefault(curve.corpora, set()).add(curve.seed)
    lists = {corpora or "not recorded": ", ".join(map(str, sorted(each))) for corpora, each in seeds.items()}
    if len(lists) == 1:
        return f"Seeds: {next(iter(lists.values()))}."
    return f"Seeds: {'; '.join(f'{each} (corpora {corpora})' for corpora, each in lists.items())}."


def held_out_curves(directory: Path, variants: Iterable[str], seeds: Sequence[int]) -> list[Curve]:
    corpora = stages.corpora_digest(directory)
    return [
        Curve(name, seed, held_out, *stages.held_out_losses(run_directory(directory, name, seed), held_out), corpora)
        for name in variants
        for seed in seeds
        for held_out in ("clean", "raw")
    ]


def read_curves(path: Path) -> list[Curve]:
    return [Curve(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def recorded_curves(path: Path, study: Study, new: Sequence[Curve]) -> list[Curve]:
    """Read the curves of other seeds than the new ones, if the same variants were run with them, for as many tokens."""
    recorded = read_curves(path) if path.exists() else []
    others = sorted({curve.seed for curve in recorded} - {curve.seed for curve in new})
    lengths = {(curve.variant, curve.held_out): curve.tokens for curve in new}
    kept = []
    for seed in others:
        curves = [curve for curve in recorded if curve.seed == seed]
        if {curve.variant for curve in curves} != set(study.variants):
            print(f"{path}: seed {seed} is omitted, since it has other variants than the study", flush=True)
        elif all(curve.tokens == lengths[curve.variant, curve.held_out] for curve in curves):
            kept += curves
        else:
            print(f"{path}: seed {seed} is omitted, since its runs have a different length", flush=True)
    return kept


if __name__ == "__main__":
    sys.exit(main())
