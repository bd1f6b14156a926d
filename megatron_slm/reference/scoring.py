"""Scoring of corpora with a reference model, for the sidecars that ``--reference-scores`` reads.

The model runs in the layout of the flags, with the trainer's code; data-parallel ranks share the rows of a corpus, and
on each the first tensor-parallel rank of the last pipeline stage writes the scores to their positions in the file. The
scores of a row depend on the row alone, so that the file is the same for any number of data-parallel ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console

from megatron_slm.checkpoint.weights import checkpoint_fingerprint, find_checkpoint
from megatron_slm.config.checkpoint_files import saved_config
from megatron_slm.config.schema import Config, ParallelConfig, ReferenceConfig
from megatron_slm.corpus.checks import CorpusInfo, bin_path, check_corpus
from megatron_slm.corpus.fingerprints import corpus_fingerprint
from megatron_slm.objective.tokens import ReferenceScores
from megatron_slm.reference.replica import FLAG, ReferenceReplica
from megatron_slm.reference.windows import CHUNK_TOKENS, Row, Span, as_micro_batch, make_row_source, scored_places
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.console import duration, progress
from megatron_slm.runtime.errors import ConfigError, DivergedError
from megatron_slm.runtime.files import check_output_prefix
from megatron_slm.runtime.groups import Groups
from megatron_slm.scores.quantization import Quantization
from megatron_slm.scores.sets import recorded_tokenizer
from megatron_slm.scores.sidecar import ContextRule, ScoresHeader, sidecar_path
from megatron_slm.scores.writer import (
    Progress,
    SidecarWriter,
    content_checksum,
    finish,
    is_finished,
    record_progress,
    reserved,
)
from megatron_slm.tokenizers.tokenizer import Tokenizer

MICRO_BATCHES = 8  # in one pass through the pipeline
SECONDS_BETWEEN_RECORDS = 20.0


@dataclass(frozen=True)
class ScoringJob:
    """Settings of a scoring job, from the flags of tools/score_corpus.py."""

    reference: ReferenceConfig  # which checkpoint, in which precision
    corpora: list[str]  # prefixes
    name: str  # of the sidecars
    parallel: ParallelConfig
    micro_batch_size: int = 8
    context: str = "document"  # or "stream"
    stride: int | None = None  # default: half the window
    with_entropy: bool = False
    verify_checksums: bool = True  # of the reference model's checkpoint
    chunk_tokens: int = CHUNK_TOKENS
    seconds_between_records: float = SECONDS_BETWEEN_RECORDS

    def check_values(self) -> None:
        """Validate the flags without reading files.

        Raises:
            ConfigError: the flag, its value, and the valid values.
        """
        parallel = self.parallel
        for flag, value in (
            ("--micro-batch-size", self.micro_batch_size),
            ("--tensor-model-parallel-size", parallel.tensor_model_parallel_size),
            ("--pipeline-model-parallel-size", parallel.pipeline_model_parallel_size),
        ):
            if value < 1:
                raise ConfigError(f"{flag} is {value}, and must be above 0.")
        if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
            raise ConfigError("--sequence-parallel needs --tensor-model-parallel-size above 1.")
        check_output_prefix(self.name, "--reference-scores", directory_allowed=True)
        if self.name.endswith(".scores"):
            raise ConfigError(f"--reference-scores {self.name}: give the name alone; NAME makes CORPUS.NAME.scores.")

    def directory(self) -> Path:
        """Return the checkpoint directory of the reference model."""
        return find_checkpoint(self.reference.reference_load or "", self.reference.reference_ckpt_step, FLAG)

    def rule(self, window: int) -> ContextRule:
        """Return the context rule for a model that was trained on ``window`` tokens.

        Raises:
            ConfigError: a --stride that does not fit the window.
        """
        stride = max(1, window // 2) if self.stride is None else self.stride
        if not 1 <= stride <= window:
            raise ConfigError(f"--stride is {stride}, and must be from 1 to {window}, the model's --seq-length.")
        return ContextRule(self.context, window, stride)


def reference_config(job: ScoringJob) -> Config:
    """Return the configuration of the reference model, in the job's layout.

    Raises:
        ConfigError: the checkpoint is missing, or its --seq-length does not fit the job.
    """
    saved = saved_config(job.directory())
    job.rule(saved.model.seq_length)
    training = replace(saved.training, micro_batch_size=job.micro_batch_size)
    model = saved.model
    if job.context == "document":  # rows hold several documents, and Transformer Engine takes no mask for that
        model = replace(model, transformer_impl="local")
    checkpoint = replace(saved.checkpoint, slm_verify_checksums=job.verify_checksums)
    return replace(
        saved, model=model, training=training, parallel=job.parallel, reference=job.reference, checkpoint=checkpoint
    )


def score_corpora(job: ScoringJob, tokenizer: Tokenizer, groups: Groups, console: Console) -> list[Path]:
    """Make a sidecar for every corpus of the job, and return their paths. Collective over all ranks.

    Finished sidecars are kept, and unfinished ones continued.

    Raises:
        ConfigError: a model, corpus, or layout that does not fit, another job's sidecar, no room on the disk.
        DivergedError: the model gives a loss that is NaN or infinite.
    """
    config = on_first_rank(lambda: reference_config(job))
    rule = job.rule(config.model.seq_length)
    model = ReferenceReplica(config, tokenizer, groups, with_entropy=job.with_entropy)
    fingerprint = on_first_rank(lambda: checkpoint_fingerprint(job.directory(), FLAG))
    paths = []
    for prefix in job.corpora:
        path = sidecar_path(prefix, job.name)
        corpus, header, finished = on_first_rank(partial(_open_job, job, tokenizer, prefix, rule, fingerprint))
        paths.append(path)
        if finished:
            console.print(f"{path}: complete, kept")
            continue
        with reserved(path, header) as begun:
            _Scorer(job, model, tokenizer.eod, groups, corpus, path, header, begun).run(console)
    return paths


def _open_job(
    job: ScoringJob, tokenizer: Tokenizer, prefix: str, rule: ContextRule, fingerprint: str
) -> tuple[CorpusInfo, ScoresHeader, bool]:
    """Return the corpus, the header of its sidecar, and whether that is finished."""
    corpus, size = check_corpus(prefix, "--data-path"), tokenizer.vocab_size
    header = ScoresHeader(
        tokens=corpus.tokens,
        corpus=corpus_fingerprint(prefix),
        tokenizer=recorded_tokenizer(tokenizer),
        reference=fingerprint,
        context=rule,
        loss=Quantization.for_losses(size),
        entropy=Quantization.for_entropies(size) if job.with_entropy else None,
        eod=tokenizer.eod,
    )
    return corpus, header, is_finished(sidecar_path(prefix, job.name), header)


class _Scorer:
    """The scoring of one corpus, from the recorded progress to the end."""

    def __init__(
        self,
        job: ScoringJob,
        model: ReferenceReplica,
        eod: int,
        groups: Groups,
        corpus: CorpusInfo,
        path: Path,
        header: ScoresHeader,
        at: Progress,
    ) -> None:
        self.job, self.model, self.eod, self.groups = job, model, eod, groups
        self.corpus, self.path, self.header, self.at = corpus, path, header, at
        self.source = make_row_source(corpus, header.context, job.chunk_tokens)
        self.ids = np.memmap(bin_path(corpus.prefix), corpus.dtype, "r")
        self.clamped, self.recorded = 0, time.monotonic()
        self.writer = SidecarWriter(path, header)
        self.together = MICRO_BATCHES * job.micro_batch_size * groups.dp_size  # rows in one pass of all ranks

    def run(self, console: Console) -> None:
        """Score the remaining rows, and give the file its name. Collective over all ranks."""
        began, before = time.monotonic(), self.at.tokens
        name = Path(self.corpus.prefix).name
        with progress(f"scoring {name}", self.corpus.tokens, "tokens", enabled=self.groups.is_logging_rank) as bar:
            bar.advance(before)
            for rows, chunk, row in self._rounds():
                for part, scores in self._run(rows):
                    self._write(part, scores)
                tokens = sum(each.stop - each.first for spans in rows for each in spans)
                self.at = replace(self.at, chunk=chunk, rows=row, tokens=self.at.tokens + tokens)
                bar.advance(tokens)
                if self._record_is_due():
                    self._record()
        self._record()
        self.writer.close()
        checksum = content_checksum(self.path)
        header = on_first_rank(lambda: finish(self.path, self.header, self.at, checksum))
        console.print(_summary(self.path, header, time.monotonic() - began, header.tokens - before))

    def _rounds(self) -> Iterator[tuple[list[Row], int, int]]:
        """Yield the rows that all ranks score together, and the chunk and the row that come next."""
        at = self.at
        left = (
            (row, chunk, number + 1)
            for chunk in range(at.chunk, self.source.chunks)
            for number, row in enumerate(self.source.rows(chunk))
            if chunk > at.chunk or number >= at.rows
        )
        while found := list(islice(left, self.together)):
            yield [row for row, _, _ in found], *found[-1][1:]

    def _run(self, rows: Sequence[Row]) -> list[tuple[Sequence[Row], ReferenceScores]]:
        """Return the scores of this replica's micro-batches on the rank that writes them, and none on the others."""
        size, stride = self.job.micro_batch_size, self.job.micro_batch_size * self.groups.dp_size
        mine = [
            rows[start : start + size] for start in range(self.groups.dp_rank * size, MICRO_BATCHES * stride, stride)
        ]
        window, packed = self.header.context.window, self.source.packed
        micro_batches = [
            as_micro_batch(part, self.ids, size, window, self.eod, packed=packed).to(self.groups.device)
            for part in mine
        ]
        found = self.model.score(micro_batches)
        reports = self.groups.is_last_stage and self.groups.tp_rank == 0
        return list(zip(mine, found, strict=True)) if reports else []

    def _write(self, rows: Sequence[Row], scores: ReferenceScores) -> None:
        losses = scores.loss.cpu().numpy()
        for row, columns, each in scored_places(rows):
            scored = losses[row, columns]
            self._check_finite(scored, each)
            self.clamped += int((scored > self.header.loss.ceiling).sum())
            self.writer.write_losses(each.first, self.header.loss.encode(scored))
        if self.header.entropy is not None and scores.entropy is not None:
            codes = self.header.entropy.encode(scores.entropy.cpu().numpy())
            for row, columns, each in scored_places(rows):
                self.writer.write_entropies(each.first, codes[row, columns])

    def _check_finite(self, losses: NDArray[np.float32], scored: Span) -> None:
        if not np.isfinite(losses).all():
            raise DivergedError(
                f"rank {self.groups.rank}: the reference model gives a loss that is NaN or infinite, for a token "
                f"at the positions {scored.first} to {scored.stop - 1} of {self.corpus.prefix}."
            )

    def _record_is_due(self) -> bool:
        """Return whether it is time to record progress, by the first rank's clock. Collective over all ranks."""
        late = time.monotonic() - self.recorded >= self.job.seconds_between_records
        due = torch.tensor(int(late), device=self.groups.device)
        dist.broadcast(due, 0)
        return bool(due.item())

    def _record(self) -> None:
        """Flush everything to disk on every rank, then record the progress. Collective over all ranks."""
        self.writer.sync()
        clamped = torch.tensor(self.clamped, device=self.groups.device)
        dist.all_reduce(clamped)
        self.at = replace(self.at, clamped=self.at.clamped + int(clamped))
        on_first_rank(lambda: record_progress(self.path, self.at))
        self.clamped, self.recorded = 0, time.monotonic()


def _summary(path: Path, header: ScoresHeader, seconds: float, tokens: int) -> str:
    return (
        f"{path}: {header.tokens:,} tokens, {header.clamped:,} of them above the ceiling of "
        f"{header.loss.ceiling:.2f} nats, the others at most {header.loss.max_error:.4f} nats off, in "
        f"{duration(seconds)} ({tokens / seconds:,.0f} tokens/s)"
    )
