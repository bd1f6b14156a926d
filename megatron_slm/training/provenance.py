"""Provenance of a run's samples: documents of a step, steps of a document, selected tokens by corpus."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from megatron_slm.checkpoint.source import find_source
from megatron_slm.config.checkpoint_files import TRACKER
from megatron_slm.config.paths import events_file, metrics_file
from megatron_slm.config.run_record import load_run_record, locate_recorded, missing_metrics
from megatron_slm.config.schema import LoggingConfig, RunConfig
from megatron_slm.corpus.index import bin_path, read_index
from megatron_slm.data.blends import file_identity, locate_corpus, parse_blend
from megatron_slm.data.document_samples import samples_of_document
from megatron_slm.data.sample_locations import DocumentSpan, document_spans
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError, read_error
from megatron_slm.runtime.files import check_regular
from megatron_slm.runtime.metrics_file import read_records, training_record
from megatron_slm.tokenizers.tokenizer import Tokenizer
from megatron_slm.training.data_order import SavedRun, read_saved_run
from megatron_slm.training.run_length import Milestone, RunLength
from megatron_slm.training.sample_orders import OrderBuilder, SampleOrder

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Represent consecutive tokens of a step's sample in their corpus."""

    sample: int  # number in the run
    span: DocumentSpan
    first_byte: int  # in .bin
    stop_byte: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Return the range [start, stop) in tokens of the document."""
        return self.span.offset, self.span.offset + self.span.tokens


@dataclass(frozen=True)
class Provenance:
    """Locate the samples of a run by its newest checkpoint, including steps after it."""

    saved: SavedRun
    length: RunLength
    builder: OrderBuilder

    @classmethod
    def open(cls, load: str, step: int | None, tokenizer: Tokenizer, flag: str = "--load") -> Provenance:
        """Return the provenance of the run whose checkpoint is given.

        Raises:
            ConfigError: the checkpoint is missing or incomplete, or the run trained on mock data.
        """
        source = find_source(load, step, flag)
        saved = read_saved_run(source, source.config())
        if saved.config.data.mock_data:
            raise ConfigError(f"{flag} {load}: the run trained on mock data, which has no documents.")
        length = RunLength.from_config(saved.config, saved.milestones)
        run = cls(saved, length, OrderBuilder(saved.config.data, tokenizer, {}))
        located = Path(run.config.logging.slm_metrics_file or "")
        for note in missing_metrics(saved.config.logging.slm_metrics_file, located):
            notice(note)
        return replace(run, length=replace(run.length, milestones=_logged_milestones(run.config, saved.milestones)))

    @property
    def config(self) -> RunConfig:
        """Return the configuration of the run, with the directory in which it is now, and its record files."""
        saved, directory = self.saved.config, self.saved.directory.parent
        if not (directory / TRACKER).exists():
            return saved
        logging = _locate_records(saved.logging, directory)
        return replace(saved, checkpoint=replace(saved.checkpoint, save=str(directory)), logging=logging)

    def samples(self, step: int) -> range:
        """Return the numbers of the samples that a step reads.

        Raises:
            ConfigError: the run has no such step.
        """
        if not 1 <= step <= self.length.iterations:
            raise ConfigError(f"--step {step}: the run has the steps 1 to {self.length.iterations}. Choose one.")
        return range(self.length.samples_at(step - 1), self.length.samples_at(step))

    def sources(self, step: int) -> Iterator[Source]:
        """Yield the documents of a step's samples in the order of the samples.

        Raises:
            ConfigError: a corpus is missing, or its content has changed, or the step read mock data.
        """
        samples = self.samples(step)
        order = self._order(samples.start)
        if order.is_mock:
            raise ConfigError(f"--step {step}: the run trained on mock data in this step, which has no documents.")
        dataset = self._dataset(order)
        for sample in samples:
            for span in document_spans(dataset, sample):
                yield _source(sample, span)

    def steps_of(self, corpus: str, document: int) -> Iterator[tuple[int, Source]]:
        """Yield each step that reads tokens of a document, and these tokens.

        Raises:
            ConfigError: the run has no such corpus, or the corpus no such document.
        """
        # a resumed run may spell the path of a corpus differently
        blends = {
            order.first: {file_identity(prefix): prefix for prefix in _prefixes(order)} for order in self.saved.orders
        }
        known = list(dict.fromkeys(prefix for blend in blends.values() for prefix in blend.values()))
        identity = file_identity(known[locate_corpus(corpus, known, "--document")])
        ends = _Ends(self.length)
        for order, stop in self._orders():
            if (prefix := blends[order.first].get(identity)) is None:
                continue
            dataset = self._dataset(order)
            count = read_index(prefix).documents
            if not 0 <= document < count:
                raise ConfigError(f"--document {corpus}:{document}: the corpus has the documents 0 to {count - 1}.")
            for sample, span in samples_of_document(dataset, prefix, document):
                if order.first <= sample < stop:
                    yield bisect_right(ends, sample) + 1, _source(sample, span)

    def _orders(self) -> Iterator[tuple[SampleOrder, int]]:
        """Yield the sample orders of the run, and the first sample after each."""
        stops = [*(order.first for order in self.saved.orders[1:]), self.length.samples]
        yield from zip(self.saved.orders, stops, strict=True)

    def _order(self, sample: int) -> SampleOrder:
        return next(order for order, stop in self._orders() if sample < stop)

    def _dataset(self, order: SampleOrder) -> Any:
        try:
            return self.builder.build(order)
        except ConfigError as error:
            raise ConfigError(f"--load {self.saved.directory}: {str(error).rstrip('.')}. Restore it.") from error


def _locate_records(logging: LoggingConfig, directory: Path) -> LoggingConfig:
    """Return settings whose metrics and events files are located by the record of the run in ``directory``."""
    try:
        record = load_run_record(directory)
    except (OSError, ValueError):
        record = {}
    metrics, events = logging.slm_metrics_file, logging.slm_events_file
    return replace(
        logging,
        slm_metrics_file=metrics and str(locate_recorded(metrics, record)),
        slm_events_file=events and str(locate_recorded(events, record)),
    )


def _logged_milestones(config: RunConfig, milestones: Sequence[Milestone]) -> tuple[Milestone, ...]:
    """Return the milestones of a run with those of its metrics, since a batch size may have changed between resumes."""
    length, last = config.model.seq_length, milestones[-1][0]
    records = (record for record in read_records(metrics_file(config)) if record["kind"] == "train")
    known = (record for record in records if 0 < record["step"] <= last and isinstance(record.get("tokens"), int))
    logged = {record["step"]: record["tokens"] for record in known}
    if any(logged.get(step, samples * length) != samples * length for step, samples in milestones):
        return tuple(milestones)  # metrics of another run
    found = {step: tokens // length for step, tokens in logged.items()} | dict(milestones)
    return tuple(sorted(found.items()))


def _prefixes(order: SampleOrder) -> list[str]:
    """Return the corpora of an order."""
    return parse_blend(order.data["train_data_path"] or order.data["data_path"])[0]


class _Ends(Sequence[int]):
    """Number of samples consumed after each step of a run, for a search."""

    def __init__(self, length: RunLength) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length.iterations

    def __getitem__(self, place: Any) -> Any:
        return self.length.samples_at(place + 1)


@cache
def _index(prefix: str) -> Any:
    return read_index(prefix)


def _source(sample: int, span: DocumentSpan) -> Source:
    index = _index(span.corpus)
    width = index.dtype.itemsize
    first = int(index.pointers[index.boundaries[span.document]]) + span.offset * width
    return Source(sample, span, first, first + span.tokens * width)


def first_words(source: Source, tokenizer: Tokenizer, tokens: int = 24) -> str:
    """Return the decoded beginning of a source."""
    dtype = _index(source.span.corpus).dtype
    start = source.first_byte // dtype.itemsize
    ids = np.memmap(bin_path(source.span.corpus), dtype, "r")[start : start + min(tokens, source.span.tokens)]
    return tokenizer.decode(ids.tolist())


@dataclass(frozen=True)
class CorpusShare:
    """Represent the part of one corpus in a step; the selected tokens are None if they were not recorded."""

    corpus: str
    samples: int
    documents: int
    tokens: int  # labels that contribute to the loss if selections were recorded; else all tokens that are read
    selected: int | None


def corpus_shares(sources: Sequence[Source], recorded: Sequence[Record] | None) -> list[CorpusShare]:
    """Return the part of each corpus in the sources of a step.

    Args:
        sources: documents of all samples of the step.
        recorded: samples of the step with their selected tokens, from a replay report or an event.
    """
    counts = {each["sample"]: (each["tokens"], each["selected"]) for each in recorded or ()}
    shares = []
    for corpus in dict.fromkeys(source.span.corpus for source in sources):
        here = [source for source in sources if source.span.corpus == corpus]
        samples = dict.fromkeys(source.sample for source in here)
        documents = len({source.span.document for source in here})
        tokens, selected = sum(source.span.tokens for source in here), None
        if recorded is not None and all(sample in counts for sample in samples):
            tokens, selected = (sum(counts[sample][place] for sample in samples) for place in (0, 1))
        shares.append(CorpusShare(corpus, len(samples), documents, tokens, selected))
    return shares


def recorded_samples(
    config: RunConfig, step: int, sources: Sequence[Source], report: str | None
) -> tuple[list[Record] | None, str]:
    """Return the samples of a step with their selected tokens and the file that has them, or None and a remedy.

    Args:
        config: configuration of the run.
        step: the step.
        sources: documents of its samples.
        report: file of --replay-report; None searches the events of the run.

    Raises:
        ConfigError: the report cannot be read, or belongs to another step or run.
    """
    if report is not None:
        content = _read_report(report)
        if content.get("step") != step:
            raise ConfigError(
                f"--replay-report {report} is the report of step {content.get('step')}, and --step is {step}. Repeat "
                f"step {step} with --replay-step {step} --replay-report FILE."
            )
        if not _has_all(content["samples"], sources):
            raise ConfigError(
                f"--replay-report {report} has other samples or documents than step {step} of this run. Give a report "
                "of this run, and of its data order."
            )
        return content["samples"], report
    file = events_file(config)
    events = [event for event in read_records(file) if event["step"] == step and event["kind"] == "event"]
    for event in reversed(events):  # of repetitions of the step, the last one
        recorded = event.get("samples")
        if _are_samples(recorded) and _has_all(recorded, sources):
            return recorded, str(file)
    return None, (
        "the run did not record the selection of each sample. To compute it, add --replay-step "
        f"{step} --replay-report FILE to the command of the run, and give --replay-report FILE here"
    )


def _are_samples(samples: Any) -> TypeGuard[list[Record]]:
    """Return whether a value of a report or an event is a list of samples with their selected tokens."""
    names = ("sample", "tokens", "selected")
    return isinstance(samples, list) and all(
        isinstance(each, dict) and all(isinstance(each.get(name), int) for name in names) for each in samples
    )


def _has_all(recorded: Sequence[Record], sources: Sequence[Source]) -> bool:
    """Return whether a report or an event has all samples of a step, with the same documents if it names them.

    A step that was repeated in another order has samples of the same numbers.
    """
    spans: dict[int, list[Record]] = {}
    for source in sources:
        spans.setdefault(source.sample, []).append({**asdict(source.span), "corpus": None})
    found = {each["sample"]: each.get("documents") for each in recorded}
    return all(
        sample in found and (found[sample] is None or _without_corpus(found[sample]) == documents)
        for sample, documents in spans.items()
    )


def _without_corpus(documents: Any) -> Any:
    """Return the documents of a report or an event without the paths of corpora, which a run may spell differently."""
    is_list = isinstance(documents, list) and all(isinstance(each, dict) for each in documents)
    return [{**each, "corpus": None} for each in documents] if is_list else documents


def _read_report(path: str) -> Record:
    try:
        check_regular(Path(path))
        content: Record = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["kind"] != "replay" or not _are_samples(content["samples"]):
            raise ValueError("it is not a report of --replay-step")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error if isinstance(error, OSError) else "it is not a report of --replay-step"
        raise read_error("--replay-report", path, reason) from error
    return content


def recorded_metrics(config: RunConfig, step: int) -> tuple[Record | None, int]:
    """Return the logged training metrics of a step, if there are any, and the number of steps in their means."""
    return training_record(metrics_file(config), step, config.logging.log_interval)
