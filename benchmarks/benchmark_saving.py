"""Compare the step time of a run without saving with synchronous and asynchronous saves.

    python benchmarks/benchmark_saving.py --size quickstart --steps 40 --save-interval 10 --output saving.json

Each variant is a run of the trainer in this process on a synthetic corpus. The time of a variant is that of all steps
after the first interval, saves included, divided by the number of steps; the last save is completed within it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from benchmark_training import SIZES, model_flags, write_corpus

from megatron_slm.runtime.files import write_text

VARIANTS: dict[str, list[str] | None] = {"no saves": None, "synchronous": [], "asynchronous": ["--async-save"]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="quickstart", help="size of the model and the batch")
    add("--steps", type=int, default=40, help="steps of every variant")
    add("--save-interval", type=int, default=10, help="steps between saves")
    add("--repeats", type=int, default=2, help="runs of every variant; the fastest counts")
    add("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    if not 0 < arguments.save_interval < arguments.steps or arguments.repeats < 1:
        parser.error("--save-interval must be above 0 and below --steps, and --repeats above 0")
    return arguments


class Bench:
    """Train variants on a shared corpus."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments, self.directory = arguments, directory
        size = SIZES[arguments.size]
        self.corpus = directory / "corpus"
        write_corpus(self.corpus, arguments.size, 2 * arguments.steps * size.batch * size.length)

    def seconds_per_step(self, name: str, number: int) -> float:
        """Train one variant, and return its mean step time after the first interval."""
        from megatron_slm.cli.pretrain import main
        from megatron_slm.training import loop
        from megatron_slm.training.saver import Saver

        times: list[float] = []
        step, finish = loop.one_step, Saver.finish

        def timed_step(*positional: Any) -> Any:
            result = step(*positional)
            times.append(time.perf_counter())
            return result

        def timed_finish(saver: Saver) -> None:
            finish(saver)
            times[-1:] = [time.perf_counter()] if len(times) == self.arguments.steps else times[-1:]

        patches = mock.patch.object(loop, "one_step", timed_step), mock.patch.object(Saver, "finish", timed_finish)
        output = io.StringIO()
        with patches[0], patches[1], contextlib.redirect_stdout(output):
            code = main(self._flags(name, number))
        if code:
            sys.exit(output.getvalue())
        first = self.arguments.save_interval
        return (times[-1] - times[first - 1]) / (len(times) - first)

    def _flags(self, name: str, number: int) -> list[str]:
        saving = VARIANTS[name]
        flags = [*model_flags(self.arguments.size), "--train-iters", str(self.arguments.steps), "--objective", "clm"]
        flags += ["--data-path", str(self.corpus), "--split", "100,0,0", "--use-distributed-optimizer"]
        if saving is None:
            return flags
        save = self.directory / f"{name}-{number}"
        interval = ["--save-interval", str(self.arguments.save_interval), "--keep-last", "1"]
        return [*flags, *saving, "--save", str(save), *interval]


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(arguments, Path(directory))
        times: dict[str, float] = {}
        for number in range(arguments.repeats):
            for name in VARIANTS:
                times[name] = min(times.get(name, float("inf")), bench.seconds_per_step(name, number))
    baseline = times["no saves"]
    for name, seconds in times.items():
        sys.stdout.write(f"{name:13} {1000 * seconds:8.1f} ms per step ({seconds / baseline - 1:+.1%})\n")
    if arguments.output is not None:
        settings = {"size": arguments.size, "steps": arguments.steps, "save_interval": arguments.save_interval}
        write_text(arguments.output, json.dumps({**settings, "seconds_per_step": times}, indent=1) + "\n", "--output")


if __name__ == "__main__":
    main()
