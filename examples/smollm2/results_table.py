"""Write the table, plot and samples of the continued pretraining."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import stages

from megatron_slm.analysis.curves import Curve, plot_comparison
from megatron_slm.runtime.files import write_text

RUNS = ("rm", "clm", "slm", "random")
NAMES = {"base": "base", "rm": "RM: CLM, clean", "clm": "CLM, raw", "slm": "SLM, raw", "random": "random, raw"}
HELD_OUT = ("clean", "raw")


def write(directory: Path, results: Path, settings: dict[str, Any], *, has_scores: bool) -> None:
    """Write ``smollm2.json``, ``.md`` and ``.png`` to ``results``, and print the table and samples.

    Without ``has_scores``, no benchmark was evaluated, and the directory may hold scores of former models.
    """
    results.mkdir(parents=True, exist_ok=True)
    content = {
        "settings": settings,
        "comparison": json.loads((directory / "comparison.json").read_text(encoding="utf-8")),
        "bits_per_byte": {name: bits_per_byte(directory, name) for name in NAMES},
        "scores": {name: scores(directory, name) if has_scores else {} for name in NAMES},
        "samples": {name: sample(directory, name) for name in NAMES},
        "curves": [vars(curve) for curve in curves(directory)],
    }
    write_text(results / "smollm2.json", json.dumps(content, indent=1) + "\n")
    plot_comparison([curve for curve in curves(directory) if curve.variant != NAMES["rm"]], results / "smollm2.png")
    text = markdown(content)
    write_text(results / "smollm2.md", text)
    print(f"{text}\nresult, table and plot: {results}")


def curves(directory: Path) -> list[Curve]:
    """Return the held-out losses of all runs, in nats per token."""
    return [
        Curve(NAMES[name], 0, held_out, *stages.held_out_losses(directory / name, held_out))
        for name in RUNS
        for held_out in HELD_OUT
    ]


def bits_per_byte(directory: Path, name: str) -> dict[str, float]:
    """Return the held-out bits per byte at the end of a run; of the base, at the start of the runs."""
    run, position = ("clm", 0) if name == "base" else (name, -1)
    records = stages.read_metrics(directory / run, "eval")
    found = {held_out: [record for record in records if record["set"] == held_out] for held_out in HELD_OUT}
    return {held_out: evaluations[position]["bits_per_byte"] for held_out, evaluations in found.items()}


def scores(directory: Path, name: str) -> dict[str, dict[str, float]]:
    """Return the accuracy of every benchmark with its standard error."""
    tasks = json.loads((directory / f"{name}-scores.json").read_text(encoding="utf-8"))["tasks"]
    return {task: next(iter(result["scores"].values())) for task, result in tasks.items()}


def percent(score: dict[str, float | None]) -> str:
    """Return an accuracy in percent; one document has no standard error."""
    value, error = score["value"], score["stderr"]
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def sample(directory: Path, name: str) -> dict[str, str]:
    """Return the prompt and its continuation."""
    line, _, _ = (directory / f"{name}-sample.jsonl").read_text(encoding="utf-8").partition("\n")
    return {key: json.loads(line)[key] for key in ("prompt", "text")}


def markdown(content: dict[str, Any]) -> str:
    """Return the comparison with transformers, the table and the samples."""
    comparison = content["comparison"]
    tasks = sorted({task for found in content["scores"].values() for task in found})
    lines = [
        f"Mean token loss of {comparison['tokens']} tokens: transformers {comparison['transformers']:.5f}, imported "
        f"{comparison['imported']:.5f}; largest difference of a token {comparison['largest_difference']:.1e}.",
        "",
        f"| model | clean bits/byte | raw bits/byte |{''.join(f' {task} |' for task in tasks)}",
        f"| --- | ---: | ---: |{' ---: |' * len(tasks)}",
    ]
    for name, title in NAMES.items():
        cells = [f"{content['bits_per_byte'][name][held_out]:.4f}" for held_out in HELD_OUT]
        found = [content["scores"][name][task] for task in tasks]
        cells += [percent(score) for score in found]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    samples = content["samples"]
    texts = {name: json.dumps(found["prompt"] + found["text"], ensure_ascii=False) for name, found in samples.items()}
    lines += ["", *(f"* {title}: {texts[name]}" for name, title in NAMES.items())]
    return "\n".join(lines) + "\n"
