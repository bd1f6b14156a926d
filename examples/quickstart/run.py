"""Run Selective Language Modeling from data to results in minutes on two CPU cores: ``make quickstart``.

The stages are corpora, tokenizer, a base model on raw text, the reference model (base model trained on clean text), and
the training model (base model trained on the selected tokens of raw text).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import stages
from rich.console import Console
from rich.table import Table

from megatron_slm.analysis.curves import Curve, plot_stages

STEPS = 40  # of each run
FOLDER = stages.FOLDER
NAMES = {"base": "base: CLM, raw", "rm": "RM: CLM, clean", "slm": "θ: SLM, raw"}


def main() -> int:
    os.chdir(stages.ROOT)  # printed paths are relative to it
    return stages.run_example(FOLDER, train_and_show)


def train_and_show() -> None:
    """Train the three models, and show their losses."""
    train_everything(FOLDER)
    plot = FOLDER / "quickstart.png"
    plot_stages([(NAMES[name], curves(FOLDER / name), steps(FOLDER / name)) for name in NAMES], plot)
    show(Console(), plot)


def train_everything(directory: Path) -> None:
    """Prepare the data, and train the three models on two data-parallel processes each."""
    stages.prepare_data(directory)
    load_base = ["--load", str(directory / "base"), "--finetune"]
    stages.train(directory, "base", "raw_train", ["--train-iters", str(STEPS)])
    stages.train(directory, "rm", "clean_train", ["--train-iters", str(STEPS), *load_base], ["base"])
    slm = ["--objective", "slm", "--slm-selection-ratio", "0.6", "--reference-load", str(directory / "rm")]
    stages.train(directory, "slm", "raw_train", ["--train-iters", str(STEPS), *load_base, *slm], ["base", "rm"])


def curves(directory: Path) -> list[Curve]:
    """Return the held-out losses of one run, one curve per set."""
    return [Curve(directory.name, 0, name, *stages.held_out_losses(directory, name)) for name in ("clean", "raw")]


def steps(directory: Path) -> list[tuple[int, float, float]]:
    """Return (tokens, loss of selected, loss of unselected) for every training step with unselected tokens."""
    return [
        (record["tokens"], record["loss"], record["loss_unselected"])
        for record in stages.read_metrics(directory, "train")
        if record["loss_unselected"] is not None
    ]


def show(console: Console, plot: Path) -> None:
    """Print the losses before and after every run, the output paths, and suggested next commands."""
    table = Table(title="held-out loss in nats per token, before and after each run")
    for column in ("run", "clean", "→", "raw", "→", "checkpoint"):
        table.add_column(column, justify="left" if column in ("run", "checkpoint") else "right", no_wrap=True)
    for name, title in NAMES.items():
        ends = [f"{loss:.3f}" for curve in curves(FOLDER / name) for loss in (curve.losses[0], curve.losses[-1])]
        table.add_row(title, *ends, str(FOLDER / name))
    console.print(table)
    console.print(f"plot     {plot}\ndata     {FOLDER / 'data'}\nmetrics  {FOLDER}/*/metrics.jsonl", highlight=False)
    console.print("\nnext: compare SLM with plain training and random selection, three seeds each:\n  make compare")
    console.print("or train θ on other tokens, for example the 40 % with the highest excess loss:")
    again = stages.training_command(FOLDER, "slm-40", ["raw_train"], [], 1)[1:]
    flags = f"--train-iters {STEPS} --load runs/quickstart/base --finetune --objective slm --slm-selection-ratio 0.4 "
    flags += "--reference-load runs/quickstart/rm"
    shown = " ".join(again).replace(f"{stages.ROOT}/", "")
    console.print(f"  .venv/bin/python {shown} {flags}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
