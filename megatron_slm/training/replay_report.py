"""Print and write the report of a replayed step, and compare it with the recorded metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_slm.config.checkpoint_files import read_manifest, step_directory
from megatron_slm.config.paths import metrics_file
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_replaceable, is_json_of, write_text
from megatron_slm.runtime.metrics_file import REPRODUCIBLE, training_record
from megatron_slm.training.loop import Run
from megatron_slm.training.step_report import SampleLosses

Report = dict[str, Any]
REPORT_FLAG = "--replay-report"
is_report = partial(is_json_of, kind="replay")
SHOWN_SAMPLES, SHOWN_DOCUMENTS = 16, 3  # in the log; the file has all
SHOWN_TEXT, WRITTEN_TEXT = 60, 400  # characters of the text of a sample


def sample_report(run: Run, sample: SampleLosses) -> Report:
    """Return the losses, documents and decoded text of a sample as a JSON object."""
    tokens = run.datasets.train[sample.sample]["tokens"].tolist()
    text = run.state.tokenizer.decode(tokens)[:WRITTEN_TEXT]
    return {**sample.record(run.datasets.train), "text": text}


def write_report(run: Run, report: Report, original: RunConfig) -> None:
    """Print the report, write it to --replay-report if that is given, and compare it with the metrics."""
    for line in (*_summary(report), *_samples(report)):
        run.console.print(line, markup=False)
    if (path := run.config.logging.replay_report) is not None:
        write_text(path, json.dumps(report, indent=1) + "\n", REPORT_FLAG, is_ours=is_report)
        run.console.print(f"report: {path}", markup=False)
    for line in _comparison(run, report, original):
        run.console.print(line, markup=False)


def check_report_file(config: RunConfig) -> None:
    """Raise ConfigError if the file of --replay-report exists and is not a report."""
    if config.logging.replay_report is not None:
        check_replaceable(config.logging.replay_report, REPORT_FLAG, is_ours=is_report)


def _summary(report: Report) -> Iterator[str]:
    figures = ("loss", "loss_all", "grad_norm", "lr", "selection")
    yield f"replayed step {report['step']}: " + ", ".join(f"{name} {report[name]}" for name in figures)
    for spike in report["spikes"]:
        yield f"spike: {spike['metric']} {spike['value']} exceeds {spike['limit']} (mean {spike['mean']})"
    for rank, names in report["nonfinite_parameters"].items():
        yield f"NaN or infinite gradients on rank {rank}, first: {', '.join(names)}"
    norms = report["rank_grad_norms"]
    if None not in norms:
        yield f"gradient norm by rank (sum over its tokens, before the reduction): {' '.join(map(_short, norms))}"
    yield "gradient norm by module:"
    for module, norm in report["module_grad_norms"].items():
        yield f"  {_short(norm):>10}  {module}"


def _samples(report: Report) -> Iterator[str]:
    samples = report["samples"]
    shown = samples[:SHOWN_SAMPLES]
    yield f"samples by loss{'' if len(shown) == len(samples) else f' (the first {len(shown)} of {len(samples)})'}:"
    for sample in shown:
        spans = [f"{span['corpus']} document {span['document']} + {span['offset']}" for span in sample["documents"]]
        more = f" and {len(spans) - SHOWN_DOCUMENTS} more" if len(spans) > SHOWN_DOCUMENTS else ""
        place = f"rank {sample['rank']} micro-batch {sample['micro_batch']} row {sample['row']}"
        diverged = f" NaN {sample['diverged']}" if sample["diverged"] else ""
        yield (
            f"  {_short(sample['loss']):>10}  sample {sample['sample']}, {place}, selected {sample['selected']} of "
            f"{sample['tokens']}{diverged}; {'; '.join(spans[:SHOWN_DOCUMENTS])}{more}: {sample['text'][:SHOWN_TEXT]!r}"
        )


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.5g}"


def _comparison(run: Run, report: Report, original: RunConfig) -> Iterator[str]:
    """Yield a line on the equality with the metrics of the run, and the reasons for possible differences."""
    if _layout_differs(run):
        yield (
            "the layout differs from that of the checkpoint: losses are equal up to rounding, and without random "
            "states dropout differs"
        )
    recorded, steps = training_record(metrics_file(original), run.progress.step, original.logging.log_interval)
    if recorded is None or steps != 1:
        return
    different = [name for name in REPRODUCIBLE if recorded.get(name) != report[name]]
    if not different:
        yield f"equal to {metrics_file(original)} in {', '.join(REPRODUCIBLE)}"
    for name in different:
        yield f"{name} {report[name]} differs from {recorded.get(name)} in {metrics_file(original)}"


def _layout_differs(run: Run) -> bool:
    flags = run.config.checkpoint
    if flags.load is None or flags.ckpt_step is None:
        return False
    try:
        saved = read_manifest(step_directory(Path(flags.load), flags.ckpt_step), "--load").layout
    except ConfigError:
        return False  # deleted by the active run in the meantime
    return saved != run.state.layout()
