"""Step time of SLM beside plain CLM, in one run: the variants take turns step by step, so that noise hits all alike.

    python benchmarks/benchmark_training.py --size quickstart --steps 30 --output training.json
    python benchmarks/benchmark_training.py --size tinyllama-1.1b --variants "SLM, RM of the same size"  # on one GPU

A synthetic corpus, reference models of one step, and a sidecar are made in a temporary folder; then every variant is
a run of the trainer's own, in one process. The bare loop is Megatron-Core without this trainer. Phases are shares of
the variant's own step; "forward, backward" is what is left when the others are taken off.
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
    """A model, its flags without dashes, and the batch that it trains on."""

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
    # For one GPU of 80 GB, and two variants at a time: each has weights and Adam's state of its own, 20 GB.
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="quickstart", help="of the model and the batch")
    add("--steps", type=int, default=30, help="measured steps of every variant")
    add("--warmup", type=int, default=3, help="steps of every variant that are not counted")
    add("--variants", nargs="+", choices=list(variants(Path())), help="default all")
    add("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


@dataclass(frozen=True)
class Variant:
    """A measured run: its flags, and the loop of its steps if that is not the trainer's."""

    flags: list[str]
    loop: Callable[[Any], Any] | None = None  # the loop of a run, which has a method ``step``


def variants(folder: Path) -> dict[str, Variant]:
    """Every variant, by name; the first is what the others are held against."""
    sidecar = [*SLM, "--reference-scores", "same"]
    beside = [*SLM, "--reference-load", str(folder / "same")]
    whole = ["--slm-scope", "global-batch"]
    clm = ["--objective", "clm"]
    return {
        "CLM": Variant(clm),
        "bare Megatron-Core loop, CLM": Variant(clm, loop=bare_loop),
        "bare Megatron-Core loop, CLM, fused": Variant(clm, loop=partial(bare_loop, fused=True)),
        "SLM, sidecar": Variant(sidecar),
        "SLM, sidecar, speculative": Variant([*sidecar, "--slm-exact-mode", "speculative"]),
        "SLM, sidecar, predicted": Variant([*sidecar, *whole, "--slm-threshold", "predicted"]),
        "SLM, sidecar, global batch": Variant([*sidecar, *whole]),
        "SLM, RM of a quarter": Variant([*SLM, "--reference-load", str(folder / "quarter")]),
        "SLM, RM of the same size": Variant(beside),
        "SLM, RM of the same size, speculative": Variant([*beside, "--slm-exact-mode", "speculative"]),
        "SLM, RM of the same size, predicted": Variant([*beside, *whole, "--slm-threshold", "predicted"]),
    }


def bare_loop(run: Any, *, fused: bool = False) -> Any:
    """Megatron-Core's loop without this trainer; imported late, as --help needs no torch."""
    from baselines.bare_loop import BareLoop

    return BareLoop(run, fused=fused)


def model_flags(size: str, *, quarter: bool = False) -> list[str]:
    """The model's flags; a quarter of the size is half as wide, and the layers are as many."""
    own = SIZES[size]
    halved = {"hidden-size", "ffn-hidden-size"} if quarter else set()
    shape = {name: value // (2 if name in halved else 1) for name, value in own.model.items()}
    shape |= {"seq-length": own.length, "vocab-size": own.vocabulary}
    shape |= {"micro-batch-size": own.micro_batch, "global-batch-size": own.batch}
    words = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    words += ["--group-query-attention"] if "num-query-groups" in own.model else []
    words += ["--bf16", "--use-distributed-optimizer"] if own.is_bf16 else []
    words += ["--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"]
    words += ["--untie-embeddings-and-output-weights", "--hidden-dropout", "0", "--attention-dropout", "0"]
    return [*words, "--tokenizer-type", "NullTokenizer", "--lr", "1e-4", "--num-workers", "0", "--eval-iters", "0"]


def write_corpus(prefix: Path, size: str, tokens: int) -> None:
    """Random documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    chance = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    while tokens > 0:
        document = chance.integers(0, SIZES[size].vocabulary, int(chance.integers(50, 1500)), dtype=np.uint16)
        builder.data_file.write(document.tobytes())
        builder.sequence_lengths.append(len(document))
        builder.end_document()
        tokens -= len(document)
    builder.finalize(f"{prefix}.idx")


class Bench:
    """Builds runs of the trainer in this process, all on one corpus."""

    def __init__(self, size: str, folder: Path, steps: int) -> None:
        from megatron_slm.runtime import process
        from megatron_slm.runtime.groups import ParallelLayout
        from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer

        self.size, self.folder, self.steps = size, folder, steps
        self.corpus = folder / "corpus"
        own = SIZES[size]
        write_corpus(self.corpus, size, (steps + 2) * own.batch * own.length)
        self.tokenizer = build_tokenizer("NullTokenizer", TokenizerFiles(vocab_size=own.vocabulary))
        self.groups = process.start(ParallelLayout())

    def run(self, flags: list[str], *, quarter: bool = False, steps: int | None = None) -> Any:
        """A run of the trainer's, ready to step."""
        from megatron_slm.config.checks import resolve
        from megatron_slm.config.flags import parse
        from megatron_slm.runtime import process
        from megatron_slm.runtime.console import make_console
        from megatron_slm.training.setup import build_run

        words = [*model_flags(self.size, quarter=quarter), *flags, "--data-path", str(self.corpus), "--split", "1,0,0"]
        config = resolve(parse([*words, "--train-iters", str(steps or self.steps)]).config, 1)
        process.seed_everything(1)  # the same weights for all
        return build_run(config, self.tokenizer, self.groups, make_console(False))

    def prepare(self) -> None:
        """Reference models of one step, and the sidecar of one of them."""
        from megatron_slm.config.schema import ParallelConfig, ReferenceConfig
        from megatron_slm.reference.scoring import ScoringJob, score_corpora
        from megatron_slm.runtime.console import make_console
        from megatron_slm.training.loop import train

        for name in ("same", "quarter"):
            train(self.run(["--save", str(self.folder / name)], quarter=name == "quarter", steps=1))
        reference = ReferenceConfig(reference_load=str(self.folder / "same"))
        job = ScoringJob(
            reference, [str(self.corpus)], "same", ParallelConfig(), context="stream", stride=SIZES[self.size].length
        )
        score_corpora(job, self.tokenizer, self.groups, make_console(False))


class Contestant:
    """A variant that steps, and the seconds of its measured steps and their phases."""

    def __init__(self, name: str, bench: Bench) -> None:
        from megatron_slm.data.batches import BatchStream

        variant = variants(bench.folder)[name]
        self.run = bench.run(variant.flags)
        self.stream = BatchStream(self.run.datasets.train, self.run.shape, device=bench.groups.device)
        self.loop = None if variant.loop is None else variant.loop(self.run)
        self.seconds: list[float] = []
        self.phases = {"reading": 0.0, "reference": 0.0, "ranking": 0.0, "optimizer": 0.0}
        optimizer, reference = self.run.state.optimizer, self.run.reference
        optimizer.step = self._timed("optimizer", optimizer.step)
        reference.score = self._timed("reference", reference.score)

    def _timed(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = now()
            result = work(*arguments)
            self.phases[phase] += now() - began
            return result

        return timed

    def step(self) -> None:
        """One step, reading of the batch included."""
        began = now()
        batches = self._timed("reading", next)(self.stream)
        if self.loop is not None:
            self.loop.step(batches)
        else:
            self._trainer_step(batches)
        self.seconds.append(now() - began)

    def _trainer_step(self, batches: Any) -> None:
        from megatron_slm.training.step import selection_ratio, train_step

        run = self.run
        ratio = selection_ratio(run.config.objective, 0)
        step = train_step(
            run.state,
            batches,
            ratio=ratio,
            next_ratio=ratio,
            reference=run.reference,
        )
        self.phases["ranking"] += step.seconds_ranking or 0.0

    def forget(self) -> None:
        """Drop the figures of steps that were for warming up."""
        self.seconds.clear()
        self.phases = dict.fromkeys(self.phases, 0.0)

    def shares(self) -> dict[str, float]:
        """Of each phase in the time of the measured steps."""
        whole = sum(self.seconds)
        own = {name: seconds / whole for name, seconds in self.phases.items()}
        return {"forward, backward": 1 - sum(own.values()), **own}


def now() -> float:
    """Seconds, when all that the device was given is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(bench: Bench, names: list[str], steps: int, warmup: int) -> dict[str, Contestant]:
    """All variants, each with its measured steps."""
    from megatron_slm.runtime.console import progress

    contestants = {name: Contestant(name, bench) for name in names}
    with progress("measuring", (steps + warmup) * len(names), "steps") as bar:
        for step in range(steps + warmup):
            for name in names[step % len(names) :] + names[: step % len(names)]:
                contestants[name].step()
                bar.advance()
            if step + 1 == warmup:
                for contestant in contestants.values():
                    contestant.forget()
    return contestants


def report(contestants: dict[str, Contestant]) -> dict[str, Any]:
    """Medians, and the median of the ratios of steps that stood side by side."""
    base = next(iter(contestants.values())).seconds
    return {
        name: {
            "median_seconds": statistics.median(own.seconds),
            "ratio": statistics.median(one / other for one, other in zip(own.seconds, base, strict=True)),
            "phases": own.shares(),
            "seconds": own.seconds,
        }
        for name, own in contestants.items()
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

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.size, Path(folder), arguments.steps + arguments.warmup)
        try:
            with quiet():
                bench.prepare()
                result = report(measure(bench, names, arguments.steps, arguments.warmup))
            where = describe_software(bench.groups)
        finally:
            process.stop()
    print(f"{where}\nsize {arguments.size}, {arguments.steps} steps each\n")
    phases = list(next(iter(result.values()))["phases"])
    heads = ["variant", "median step, ms", "tokens/s", "of CLM's", *phases]
    tokens = SIZES[arguments.size].batch * SIZES[arguments.size].length
    print(f"| {' | '.join(heads)} |\n| --- |{' ---: |' * (len(heads) - 1)}")
    for name, own in result.items():
        shares = [f"{share:.1%}" for share in own["phases"].values()]
        seconds = own["median_seconds"]
        cells = [name, f"{seconds * 1e3:.1f}", f"{tokens / seconds:,.0f}", f"{own['ratio']:.3f}", *shares]
        print(f"| {' | '.join(cells)} |")
    if arguments.output is not None:
        settings = {"size": arguments.size, "steps": arguments.steps, "software": where}
        write_text(
            arguments.output, json.dumps({"settings": settings, "variants": result}, indent=1) + "\n", "--output"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
