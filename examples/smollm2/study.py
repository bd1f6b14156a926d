"""Study SmolLM2-135M: token dynamics of its continued pretraining, and self-reference.

``python examples/smollm2/study.py dynamics`` continues the pretraining of the model with CLM on raw text, saves a
checkpoint every few steps, and analyzes the losses of held-out tokens (Rho-1, section 2.1). ``self-reference`` takes
the model itself, which was trained on raw text, as the reference model (appendix H), with CLM and random selection
beside it; ``--seeds 1`` adds one seed to the table. Completed stages are reused.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "quickstart"))  # its stages

import compare
import continue_pretraining as example
import stages
from studies import STUDIES

REFERENCE = "dynamics-rm"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("dynamics", "self-reference"))
    example.add_sizes(parser, steps=16, reference_steps=8)
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens of the dynamics [%(default)s]")
    parser.add_argument("--save-interval", type=int, default=2, help="steps between checkpoints [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=compare.SEEDS, help="of self-reference; default 1 2 3")
    arguments = parser.parse_args(argv)
    example.check_sizes(parser, arguments)
    values = vars(arguments)
    study, tokens, interval, seeds = (values.pop(name) for name in ("study", "tokens", "save_interval", "seeds"))
    if min(seeds) < 1:
        parser.error("--seeds must be at least 1")
    settings = example.Settings(**values)
    if study == "dynamics" and interval >= settings.steps:
        parser.error(f"--save-interval {interval} saves one checkpoint in {settings.steps} steps; dynamics need two")

    def work() -> None:
        example.prepare_model(settings)
        example.prepare_data(settings)
        if study == "dynamics":
            analyze_dynamics(settings, tokens, interval)
        else:
            compare_self_reference(settings, sorted(set(seeds)))

    os.chdir(stages.ROOT)
    return stages.run_example(settings.directory, work)


def analyze_dynamics(settings: example.Settings, tokens: int, interval: int) -> None:
    """Train a reference model on clean text and a run with checkpoints on raw text, and analyze the run."""
    directory, once = settings.directory, ["--eval-interval", str(settings.steps)]
    example.train(settings, REFERENCE, "clean_train", settings.reference_steps, once)
    flags = [*once, "--save-interval", str(interval), "--no-save-optim", "--objective", "clm"]
    example.train(settings, "dynamics", "raw_train", settings.steps, flags)
    output = directory / "dynamics-analysis"
    command = [sys.executable, "tools/analyze_dynamics.py", "--load", str(directory / "dynamics")]
    command += ["--reference-load", str(directory / REFERENCE), "--data-path", stages.corpus(directory, "raw_valid")]
    stages.run([*command, "--tokens", str(tokens), "--output", str(output)])
    if settings.results:
        settings.results.mkdir(parents=True, exist_ok=True)
        for name in ("dynamics.json", "dynamics.png"):
            shutil.copy(output / name, settings.results / name)


def compare_self_reference(settings: example.Settings, seeds: Sequence[int]) -> None:
    """Train every variant with every seed, and write the table and the plot."""
    study = STUDIES["self-reference"]
    for seed in seeds:
        for name, variant in study.variants.items():
            flags = [*variant.flags, "--seed", str(seed), "--eval-interval", str(settings.steps)]
            if variant.reference:
                flags += ["--reference-load", str(settings.directory / "base")]
            run = compare.run_directory(settings.directory, name, seed)
            example.train(settings, run.name, "raw_train", settings.steps, flags)  # its base is the reference model
    compare.report(settings.directory, "self-reference", study, seeds, settings.results or settings.directory)


if __name__ == "__main__":
    sys.exit(main())
