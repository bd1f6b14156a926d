"""Scores corpora once with a reference model: the sidecars that ``--reference-scores`` reads.

The model runs in the layout that the flags ask for, with the trainer's own code; data-parallel ranks share the rows
of a corpus, and the last pipeline stage's first tensor-parallel rank of each writes what it found to its places of
the file. A row's scores depend on the row alone, so the file is the same for any number of data-parallel ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console

from megatron_slm.config.checkpoint_files import saved_config
from megatron_slm.config.schema import Config, ParallelConfig, ReferenceConfig
from megatron_slm.data.corpus import CorpusInfo, bin_path, check_corpus
from megatron_slm.data.fingerprints import corpus_fingerprint
from megatron_slm.data.scores.code import ScoreCode
from megatron_slm.data.scores.codebooks import Codebooks, TokenCode, fit, loss_code
from megatron_slm.data.scores.sets import recorded_tokenizer
from megatron_slm.data.scores.sidecar import ContextRule, ScoresHeader, partial_path, read_loss_code, sidecar_path
from megatron_slm.data.scores.writer import (
    Progress,
    SidecarWriter,
    content_checksum,
    finish,
    is_finished,
    record_progress,
    reserve,
)
from megatron_slm.data.tokenizers.tokenizer import Tokenizer
from megatron_slm.model.weights import checkpoint_fingerprint, find_checkpoint
from megatron_slm.objective.selective_loss import ReferenceScores
from megatron_slm.reference.calibration import Found, count_losses, sample_rows, sample_size
from megatron_slm.reference.replica import FLAG, ReferenceReplica
from megatron_slm.reference.windows import CHUNK_TOKENS, Row, Span, as_micro_batch, make_plan, scored_places
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.console import Advance, duration, progress
from megatron_slm.runtime.errors import ConfigError, DivergedError
from megatron_slm.runtime.files import check_output_prefix
from megatron_slm.runtime.groups import Groups

MICRO_BATCHES = 8  # in one pass through the pipeline
SECONDS_BETWEEN_RECORDS = 20.0


@dataclass(frozen=True)
class ScoringJob:
    """What the flags of tools/score_corpus.py say."""

    reference: ReferenceConfig  # which checkpoint, in which precision
    corpora: list[str]  # prefixes
    name: str  # of the sidecars
    parallel: ParallelConfig
    micro_batch_size: int = 8
    context: str = "document"  # or "stream"
    stride: int | None = None  # default: half the window
    score_bytes: int = 1
    with_entropy: bool = False
    verify_checksums: bool = True  # of the reference model's checkpoint
    chunk_tokens: int = CHUNK_TOKENS
    seconds_between_records: float = SECONDS_BETWEEN_RECORDS

    def check(self) -> None:
        """Refuse what can be known to be wrong from the flags and the model's settings alone.

        Raises:
            ConfigError: the flag, its value, and what would be right.
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
        self.rule(saved_config(self.directory()).model.seq_length or 0)

    def directory(self) -> Path:
        """The folder of the reference model's checkpoint."""
        own = self.reference
        return find_checkpoint(own.reference_load or "", own.reference_ckpt_step, FLAG)

    def rule(self, window: int) -> ContextRule:
        """The context of every token, for a model that was trained on ``window`` tokens."""
        stride = max(1, window // 2) if self.stride is None else self.stride
        if not 1 <= stride <= window:
            raise ConfigError(f"--stride is {stride}, and must be from 1 to {window}, the model's --seq-length.")
        return ContextRule(self.context, window, stride)


def reference_config(job: ScoringJob) -> Config:
    """The configuration of the reference model, in the job's layout."""
    saved = saved_config(job.directory())
    training = replace(saved.training, micro_batch_size=job.micro_batch_size)
    model = saved.model
    if job.context == "document":  # rows hold several documents, and Transformer Engine takes no mask for that
        model = replace(model, transformer_impl="local")
    checkpoint = replace(saved.checkpoint, slm_verify_checksums=job.verify_checksums)
    return replace(
        saved, model=model, training=training, parallel=job.parallel, reference=job.reference, checkpoint=checkpoint
    )


def score_corpora(job: ScoringJob, tokenizer: Tokenizer, groups: Groups, console: Console) -> list[Path]:
    """Make a sidecar for every corpus of the job, and tell where they are. Collective over all ranks.

    What is finished is kept, what was begun goes on.

    Raises:
        ConfigError: a model, corpus, or layout that does not fit, another job's sidecar, no room on the disk.
        DivergedError: the model gives a loss that is NaN or infinite.
    """
    config = reference_config(job)
    model = ReferenceReplica(config, tokenizer, groups, with_entropy=job.with_entropy)
    fingerprint = checkpoint_fingerprint(job.directory(), FLAG)
    paths = []
    for prefix in job.corpora:
        corpus = check_corpus(prefix, "--data-path")
        header = ScoresHeader(
            tokens=corpus.tokens,
            corpus=corpus_fingerprint(prefix),
            tokenizer=recorded_tokenizer(tokenizer),
            reference=fingerprint,
            context=job.rule(config.model.seq_length or 0),
            loss=loss_code(tokenizer.vocab_size, job.score_bytes),
            entropy=ScoreCode.for_entropy(tokenizer.vocab_size, job.score_bytes) if job.with_entropy else None,
        )
        path = sidecar_path(prefix, job.name)
        paths.append(path)
        if is_finished(path, header):
            console.print(f"{path}: done before, kept")
        else:
            _Scorer(job, model, tokenizer.eod, groups, corpus, path, header).run(console)
    return paths


class _Scorer:
    """The work on one corpus, from where it is to the end."""

    def __init__(
        self,
        job: ScoringJob,
        model: ReferenceReplica,
        eod: int,
        groups: Groups,
        corpus: CorpusInfo,
        path: Path,
        header: ScoresHeader,
    ) -> None:
        self.job, self.model, self.eod, self.groups = job, model, eod, groups
        self.corpus, self.path, self.header = corpus, path, header
        self.plan = make_plan(corpus, header.context, job.chunk_tokens)
        self.ids = np.memmap(bin_path(corpus.prefix), corpus.dtype, "r")
        self.at = self._reserve()
        self.clamped, self.recorded = 0, time.monotonic()
        self.writer = SidecarWriter(path, header)
        self.together = MICRO_BATCHES * job.micro_batch_size * groups.dp_size  # rows in one pass of all ranks
        self.code = self._calibrated()

    def run(self, console: Console) -> None:
        """Score what is left, and give the file its name. Collective over all ranks."""
        began, before = time.monotonic(), self.at.tokens
        with self._bar("scoring", self.corpus.tokens) as bar:
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
        if self.groups.is_logging_rank:
            header = finish(self.path, self.header, self.at, checksum)
            console.print(_summary(self.path, header, time.monotonic() - began, header.tokens - before))
        dist.barrier()

    def _reserve(self) -> Progress:
        """Prepare the file on the first rank; return the progress of an earlier job on all."""
        return on_first_rank(lambda: reserve(self.path, self.header))

    def _rounds(self) -> Iterator[tuple[list[Row], int, int]]:
        """The rows that all ranks score together, and the chunk and the row that come next."""
        at = self.at
        left = (
            (row, chunk, number + 1)
            for chunk in range(at.chunk, self.plan.chunks)
            for number, row in enumerate(self.plan.rows(chunk))
            if chunk > at.chunk or number >= at.rows
        )
        while found := list(islice(left, self.together)):
            yield [row for row, _, _ in found], *found[-1][1:]

    def _calibrated(self) -> Codebooks | ScoreCode:
        """What encodes the losses: codebooks are fitted first, if the file has none yet. Collective over all ranks."""
        code = self.header.loss
        if isinstance(code, TokenCode) and not self.at.calibrated:
            self._calibrate(code)
        return read_loss_code(partial_path(self.path), self.header)

    def _calibrate(self, code: TokenCode) -> None:
        rows = sample_rows(self.corpus, self.header.context)
        with self._bar("calibrating", sample_size(self.corpus.tokens)) as bar:

            def score(part: Sequence[Row]) -> Found:
                found = self._found(part)
                bar.advance(sum(each.stop - each.first for spans in part for each in spans))
                return found

            counts = count_losses(code, rows, self.together, score, self.groups.device)
        self.at = replace(self.at, calibrated=True)
        if self.groups.is_logging_rank:
            self.writer.write_codebooks(fit(code, counts))
            self.writer.sync()
            record_progress(self.path, self.at)
        dist.barrier()

    def _found(self, rows: Sequence[Row]) -> Found:
        """Losses and ids of the tokens that this rank scores and reports."""
        losses, ids = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
        for part, scores in self._run(rows):
            own = scores.loss.cpu().numpy()
            for row, columns, each in scored_places(part):
                self._check_finite(own[row, columns], each)
                losses.append(own[row, columns])
                ids.append(self._labels(each))
        return np.concatenate(losses), np.concatenate(ids)

    def _labels(self, scored: Span) -> NDArray[np.int64]:
        return self.ids[scored.first : scored.stop].astype(np.int64)

    def _run(self, rows: Sequence[Row]) -> list[tuple[Sequence[Row], ReferenceScores]]:
        """Run the model on this rank's part of the rows: what it says of them, on the one rank that reports it."""
        size, stride = self.job.micro_batch_size, self.job.micro_batch_size * self.groups.dp_size
        mine = [
            rows[start : start + size] for start in range(self.groups.dp_rank * size, MICRO_BATCHES * stride, stride)
        ]
        window, packed = self.header.context.window, self.plan.packed
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
            own = losses[row, columns]
            self._check_finite(own, each)
            self.clamped += int((own > self.header.loss.ceiling).sum())
            self.writer.write_losses(each.first, self.code.encode(own, self._labels(each)))
        if self.header.entropy is not None and scores.entropy is not None:
            codes = self.header.entropy.encode(scores.entropy.cpu().numpy())
            for row, columns, each in scored_places(rows):
                self.writer.write_entropies(each.first, codes[row, columns])

    def _check_finite(self, losses: NDArray[np.float32], scored: Span) -> None:
        if not np.isfinite(losses).all():
            raise DivergedError(
                f"rank {self.groups.rank}: the reference model gives a loss that is NaN or infinite, for a token "
                f"in the places {scored.first} to {scored.stop - 1} of {self.corpus.prefix}."
            )

    def _record_is_due(self) -> bool:
        """Whether it is time to record progress, as the first rank's clock says. Collective over all ranks."""
        late = time.monotonic() - self.recorded >= self.job.seconds_between_records
        due = torch.tensor(int(late), device=self.groups.device)
        dist.broadcast(due, 0)
        return bool(due.item())

    def _record(self) -> None:
        """Bring everything to disk on every rank, then record it. Collective over all ranks."""
        self.writer.sync()
        clamped = torch.tensor(self.clamped, device=self.groups.device)
        dist.all_reduce(clamped)
        self.at = replace(self.at, clamped=self.at.clamped + int(clamped))
        if self.groups.is_logging_rank:
            record_progress(self.path, self.at)
        self.clamped, self.recorded = 0, time.monotonic()

    def _bar(self, work: str, tokens: int) -> AbstractContextManager[Advance]:
        name = Path(self.corpus.prefix).name
        return progress(f"{work} {name}", tokens, "tokens", enabled=self.groups.is_logging_rank)


def _summary(path: Path, header: ScoresHeader, seconds: float, tokens: int) -> str:
    return (
        f"{path}: {header.tokens:,} tokens, {header.clamped:,} of them above the ceiling of "
        f"{header.loss.ceiling:.2f} nats, the others at most {header.loss.max_error:.4f} nats off, in "
        f"{duration(seconds)} ({tokens / seconds:,.0f} tokens/s)"
    )
