"""Compare the step time of SLM with CLM in one run; variants are interleaved by step, so that noise is shared.

    python benchmarks/benchmark_training.py --size quickstart --steps 30 --output training.json
    python benchmarks/benchmark_training.py --size tinyllama-1.1b --variants "SLM, RM of the same size"  # on one GPU

A synthetic corpus, one-step reference models and a sidecar are created in a temporary directory; every variant is a run
of the trainer in the same process. The bare loop is Megatron-Core without this trainer. Phases are shares of the
variant's step time; "forward, backward" is the remainder. Saved values are the peak of tensors saved for the backward
pass, without parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.runtime.files import write_text


@dataclass(frozen=True)
class Size:
    """Represent a model (flags without dashes), its vocabulary, and its batch."""

    model: dict[str, int]
    vocabulary: int
    length: int
    micro_batch: int
    batch: int
    is_bf16: bool = False


SIZES = {
    "tiny": Size({"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4}, 512, 64, 4, 8),
    "quickstart": Size({"num-layers": 4, "hidden-size": 160, "num-attention-heads": 4}, 4096, 256, 8, 16),
    "medium": Size({"num-layers": 8, "hidden-size": 512, "num-attention-heads": 8}, 16000, 512, 4, 8),
    "12-layer": Size({"num-layers": 12, "hidden-size": 768, "num-attention-heads": 12}, 16000, 512, 2, 4),
    # For one 80 GB GPU and two variants at a time, each with 20 GB of weights and Adam state.
    "tinyllama-1.1b": Size(
        {
            "num-layers": 22,
            "hidden-size": 2048,
            "ffn-hidden-size": 5632,
            "num-attention-heads": 32,
            "num-query-groups": 4,
        },
        *(32000, 2048, 8, 64),
        is_bf16=True,
    ),
}
SLM = ["--objective", "slm", "--slm-selection-ratio", "0.6"]
FILTERED = ["--slm-backward", "filtered"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="quickstart", help="size of the model and the batch")
    add("--steps", type=int, default=30, help="measured steps of every variant")
    add("--warmup", type=int, default=3, help="warm-up steps of every variant, at least 1")
    add("--variants", nargs="+", choices=list(variants(Path())), help="default all")
    add("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


@dataclass(frozen=True)
class Variant:
    """Represent a measured run: its flags, and its training loop if not the trainer's."""

    flags: list[str]
    loop: Callable[[Any], Any] | None = None  # returns a loop with a method ``step``


def variants(directory: Path) -> dict[str, Variant]:
    """Return all variants by name; the first one is the baseline."""
    sidecar = [*SLM, "--reference-scores", "same"]
    replica = [*SLM, "--reference-load", str(directory / "same")]
    scope = ["--slm-scope", "global-batch"]
    clm = ["--objective", "clm"]
    return {
        "CLM": Variant(clm),
        "bare Megatron-Core loop, CLM": Variant(clm, loop=bare_loop),
        "bare Megatron-Core loop, CLM, fused": Variant(clm, loop=partial(bare_loop, fused=True)),
        "SLM, sidecar": Variant(sidecar),
        "SLM, sidecar, filtered": Variant([*sidecar, *FILTERED]),
        "SLM, sidecar, speculative": Variant([*sidecar, "--slm-exact-mode", "speculative"]),
        "SLM, sidecar, predicted": Variant([*sidecar, *scope, "--slm-threshold", "predicted"]),
        "SLM, sidecar, global batch": Variant([*sidecar, *scope]),
        "SLM, RM of a quarter": Variant([*SLM, "--reference-load", str(directory / "quarter")]),
        "SLM, RM of the same size": Variant(replica),
        "SLM, RM of the same size, filtered": Variant([*replica, *FILTERED]),
        "SLM, RM of the same size, speculative": Variant([*replica, "--slm-exact-mode", "speculative"]),
        "SLM, RM of the same size, predicted": Variant([*replica, *scope, "--slm-threshold", "predicted"]),
    }


def bare_loop(run: Any, *, fused: bool = False) -> Any:
    """Return Megatron-Core's loop; imported locally, since --help does not need torch."""
    from baselines.bare_loop import BareLoop

    return BareLoop(run, fused=fused)


def model_flags(size: str, *, quarter: bool = False) -> list[str]:
    """Return the model's flags; a quarter of the size has half the width and the same layers."""
    settings = SIZES[size]
    halved = {"hidden-size", "ffn-hidden-size"} if quarter else set()
    shape = {name: value // (2 if name in halved else 1) for name, value in settings.model.items()}
    shape |= {"seq-length": settings.length, "vocab-size": settings.vocabulary}
    shape |= {"micro-batch-size": settings.micro_batch, "global-batch-size": settings.batch}
    flags = [part for name, value in shape.items() for part in (f"--{name}", str(value))]
    flags += ["--group-query-attention"] if "num-query-groups" in settings.model else []
    flags += ["--bf16", "--use-distributed-optimizer"] if settings.is_bf16 else []
    flags += ["--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"]
    flags += ["--untie-embeddings-and-output-weights", "--hidden-dropout", "0", "--attention-dropout", "0"]
    return [*flags, "--tokenizer-type", "NullTokenizer", "--lr", "1e-4", "--num-workers", "0", "--eval-iters", "0"]


def write_corpus(prefix: Path, size: str, tokens: int) -> None:
    """Write a corpus of random documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    while tokens > 0:
        document = rng.integers(0, SIZES[size].vocabulary, int(rng.integers(50, 1500)), dtype=np.uint16)
        builder.data_file.write(document.tobytes())
        builder.sequence_lengths.append(len(document))
        builder.end_document()
        tokens -= len(document)
    builder.finalize(f"{prefix}.idx")


class Bench:
    """Build runs of the trainer in this process on a shared corpus."""

    def __init__(self, size: str, directory: Path, steps: int) -> None:
        from megatron_slm.runtime import process
        from megatron_slm.runtime.groups import ParallelLayout
        from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer

        self.size, self.directory, self.steps = size, directory, steps
        self.corpus = directory / "corpus"
        settings = SIZES[size]
        write_corpus(self.corpus, size, (steps + 2) * settings.batch * settings.length)
        self.tokenizer = build_tokenizer("NullTokenizer", TokenizerFiles(vocab_size=settings.vocabulary))
        self.groups = process.start(ParallelLayout())

    def run(self, flags: list[str], *, quarter: bool = False, steps: int | None = None) -> Any:
        """Build a run of the trainer."""
        from megatron_slm.config.checks import resolve
        from megatron_slm.config.flags import parse
        from megatron_slm.runtime import process
        from megatron_slm.runtime.console import make_console
        from megatron_slm.training.setup import build_run

        argv = [*model_flags(self.size, quarter=quarter), *flags, "--data-path", str(self.corpus), "--split", "1,0,0"]
        config = resolve(parse([*argv, "--train-iters", str(steps or self.steps)]).config, 1)
        process.seed_everything(1)  # equal weights in all variants
        return build_run(config, self.tokenizer, self.groups, make_console(False))

    def prepare(self) -> None:
        """Train one-step reference models, and create the sidecar of one of them."""
        from megatron_slm.config.schema import ParallelConfig, ReferenceConfig
        from megatron_slm.reference.scoring import ScoringJob, score_corpora
        from megatron_slm.runtime.console import make_console
        from megatron_slm.training.loop import train

        for name in ("same", "quarter"):
            train(self.run(["--save", str(self.directory / name)], quarter=name == "quarter", steps=1))
        reference = ReferenceConfig(reference_load=[str(self.directory / "same")])
        job = ScoringJob(
            reference, [str(self.corpus)], "same", ParallelConfig(), context="stream", stride=SIZES[self.size].length
        )
        score_corpora(job, self.tokenizer, self.groups, make_console(False))


class Measurement:
    """Run the steps of a variant, and record their seconds and phases."""

    def __init__(self, name: str, bench: Bench) -> None:
        from megatron_slm.data.batches import BatchStream

        variant = variants(bench.directory)[name]
        self.run = bench.run(variant.flags)
        self.stream = BatchStream(self.run.datasets.train, self.run.shape, device=bench.groups.device)
        self.loop = None if variant.loop is None else variant.loop(self.run)
        self.seconds: list[float] = []
        self.phases = {"reading": 0.0, "reference": 0.0, "ranking": 0.0, "optimizer": 0.0}
        self.saved_bytes = 0  # peak of the values that the forward pass saves for the backward pass
        state = self.run.state
        state.optimizer_step = self._timed("optimizer", state.optimizer_step)
        state.optimizer.step = self._timed("optimizer", state.optimizer.step)  # of the bare loop
        self.run.reference = self._timed("reference", self.run.reference)

    def _timed(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = now()
            result = work(*arguments)
            self.phases[phase] += now() - began
            return result

        return timed

    def step(self) -> None:
        """Run one step, including reading of the batch."""
        began = now()
        batches = self._timed("reading", next)(self.stream)
        if self.loop is not None:
            self.loop.step(batches)
        else:
            self._trainer_step(batches)
        self.seconds.append(now() - began)

    def _trainer_step(self, batches: Any) -> None:
        from megatron_slm.training.curriculum import selection_ratio
        from megatron_slm.training.step import train_step

        run = self.run
        ratio = selection_ratio(run.config.objective, 0, 0)
        step = train_step(
            run.state,
            batches,
            ratio=ratio,
            next_ratio=ratio,
            reference=run.reference,
            observer=lambda step, grad_norm: not step.sums.diverged,
        )
        run.state.scheduler.step(increment=run.shape.global_batch_size)
        self.phases["ranking"] += step.seconds_ranking or 0.0

    def measure_saved_bytes(self) -> None:
        """Run a step, and record the peak of the values that it saves for the backward pass."""
        from baselines.saved_values import SavedValues

        with SavedValues(self.run.state.model_chunks) as values:
            self.step()
        self.saved_bytes = values.peak

    def reset(self) -> None:
        """Discard the times of warm-up steps."""
        self.seconds.clear()
        self.phases = dict.fromkeys(self.phases, 0.0)

    def shares(self) -> dict[str, float]:
        """Return the share of each phase in the measured time."""
        total = sum(self.seconds)
        shares = {name: seconds / total for name, seconds in self.phases.items()}
        return {"forward, backward": 1 - sum(shares.values()), **shares}


def now() -> float:
    """Return the time in seconds after synchronizing with the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(bench: Bench, names: list[str], steps: int, warmup: int) -> dict[str, Measurement]:
    """Measure all variants, interleaved by step."""
    from megatron_slm.runtime.console import progress

    measurements = {name: Measurement(name, bench) for name in names}
    with progress("measuring", (steps + warmup) * len(names), "steps") as bar:
        for step in range(steps + warmup):
            for name in names[step % len(names) :] + names[: step % len(names)]:
                measurements[name].step() if step else measurements[name].measure_saved_bytes()
                bar.advance()
            if step + 1 == warmup:
                for measurement in measurements.values():
                    measurement.reset()
    return measurements


def report(measurements: dict[str, Measurement]) -> dict[str, Any]:
    """Return median step times, and the median ratio to the baseline's step of the same turn."""
    base = next(iter(measurements.values())).seconds
    return {
        name: {
            "median_seconds": statistics.median(each.seconds),
            "ratio": statistics.median(one / other for one, other in zip(each.seconds, base, strict=True)),
            "phases": each.shares(),
            "saved_bytes": each.saved_bytes,
            "seconds": each.seconds,
        }
        for name, each in measurements.items()
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def main() -> int:
    arguments = parse_arguments()
    names = arguments.variants or list(variants(Path()))
    names = ["CLM", *(name for name in names if name != "CLM")]
    from megatron_slm.runtime import process
    from megatron_slm.runtime.software import describe_software

    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(arguments.size, Path(directory), arguments.steps + arguments.warmup)
        try:
            with quiet():
                bench.prepare()
                result = report(measure(bench, names, arguments.steps, arguments.warmup))
            software = describe_software(bench.groups)
        finally:
            process.stop()
    print(f"{software}\nsize {arguments.size}, {arguments.steps} steps each\n")
    phases = list(next(iter(result.values()))["phases"])
    heads = ["variant", "median step, ms", "tokens/s", "of CLM's", "saved values, MiB", *phases]
    tokens = SIZES[arguments.size].batch * SIZES[arguments.size].length
    print(f"| {' | '.join(heads)} |\n| --- |{' ---: |' * (len(heads) - 1)}")
    for name, figures in result.items():
        shares = [f"{share:.1%}" for share in figures["phases"].values()]
        seconds = figures["median_seconds"]
        cells = [name, f"{seconds * 1e3:.1f}", f"{tokens / seconds:,.0f}", f"{figures['ratio']:.3f}"]
        cells += [f"{figures['saved_bytes'] / 2**20:,.0f}", *shares]
        print(f"| {' | '.join(cells)} |")
    if arguments.output is not None:
        settings = {"size": arguments.size, "steps": arguments.steps, "software": software}
        write_text(
            arguments.output, json.dumps({"settings": settings, "variants": result}, indent=1) + "\n", "--output"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
