"""Score corpora with a reference model and write the sidecars for ``--reference-scores``.

The model runs in the configured layout with the trainer's code. Data-parallel ranks divide the rows of a corpus; in
each replica, the first tensor-parallel rank of the last pipeline stage writes the scores to their file positions. The
scores of a row depend only on the row, so the file is identical for any number of data-parallel ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, tee
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console

from megatron_slm.checkpoint.source import CheckpointSource, find_source
from megatron_slm.config.relations.objective import sidecar_name_problem
from megatron_slm.config.schema import ParallelConfig, ReferenceConfig, RunConfig
from megatron_slm.corpus.checks import CorpusInfo, bin_path, check_corpus
from megatron_slm.corpus.fingerprints import corpus_fingerprint
from megatron_slm.data.batches import MicroBatch
from megatron_slm.data.read_ahead import read_ahead
from megatron_slm.objective.tokens import ReferenceScores
from megatron_slm.reference.replica import FLAG, ReferenceReplica
from megatron_slm.reference.windows import (
    CHUNK_TOKENS,
    Row,
    Span,
    build_micro_batch,
    check_ids,
    make_row_source,
    scored_positions,
)
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.console import format_duration
from megatron_slm.runtime.console import progress as progress_bar
from megatron_slm.runtime.errors import ConfigError, DivergedError
from megatron_slm.runtime.files import check_output_prefix
from megatron_slm.runtime.groups import Groups
from megatron_slm.runtime.health.progress import progress as health
from megatron_slm.scores.quantization import Quantization
from megatron_slm.scores.sets import recorded_tokenizer
from megatron_slm.scores.sidecar import ContextRule, ScoresHeader, check_paths_differ, sidecar_path
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

MICRO_BATCHES = 8  # per pipeline pass
SECONDS_BETWEEN_RECORDS = 20.0


@dataclass(frozen=True)
class ScoringJob:
    """Settings of a scoring job, from the flags of tools/score_corpus.py."""

    reference: ReferenceConfig  # checkpoint and precision
    corpora: list[str]  # prefixes
    name: str  # sidecar name
    parallel: ParallelConfig
    micro_batch_size: int = 8
    context: str = "document"  # or "stream", or "example" for fine-tuning
    stride: int | None = None  # default: half of the window
    seq_length: int | None = None  # window; default and maximum: the model's sequence length
    with_entropy: bool = False
    verify_checksums: bool = True  # verify the reference checkpoint's checksums
    chunk_tokens: int = CHUNK_TOKENS
    seconds_between_records: float = SECONDS_BETWEEN_RECORDS

    def check_values(self) -> None:
        """Validate the flags without reading files.

        Raises:
            ConfigError: a value is invalid; the message contains the flag and valid values.
        """
        if self.micro_batch_size < 1:
            raise ConfigError(f"--micro-batch-size is {self.micro_batch_size}, and must be above 0.")
        if self.parallel.sequence_parallel and self.parallel.tensor_model_parallel_size == 1:
            raise ConfigError("--sequence-parallel needs --tensor-model-parallel-size above 1.")
        check_output_prefix(self.name, "--reference-scores", directory_allowed=True)
        if (problem := sidecar_name_problem(self.name)) is not None:
            raise ConfigError(problem)
        check_paths_differ(self.corpora, self.name)

    def source(self) -> CheckpointSource:
        """Return the checkpoint of the reference model."""
        source = find_source(self.reference.reference_load[0], self.reference.reference_ckpt_step, FLAG)
        source.check()
        return source

    def rule(self, window: int) -> ContextRule:
        """Return the context rule for a model trained with a sequence length of ``window`` tokens.

        Raises:
            ConfigError: --stride is outside of 1 to ``window``.
        """
        stride = max(1, window // 2) if self.stride is None else self.stride
        if not 1 <= stride <= window:
            raise ConfigError(f"--stride is {stride}, and must be from 1 to {window}, the model's --seq-length.")
        return ContextRule(self.context, window, stride)


def reference_config(job: ScoringJob) -> RunConfig:
    """Return the configuration of the reference model, in the job's layout.

    Raises:
        ConfigError: the checkpoint is missing, or its --seq-length does not match --stride.
    """
    saved = _with_length(job.source().config(), job.seq_length)
    job.rule(saved.model.seq_length)
    training = replace(saved.training, micro_batch_size=job.micro_batch_size)
    model = replace(saved.model, moe_token_dispatcher_type="allgather")  # alltoall needs GPUs
    checkpoint = replace(saved.checkpoint, slm_verify_checksums=job.verify_checksums)
    return replace(
        saved, model=model, training=training, parallel=job.parallel, reference=job.reference, checkpoint=checkpoint
    )


def _with_length(config: RunConfig, length: int | None) -> RunConfig:
    """Return the configuration with a shorter sequence length."""
    longest = config.model.seq_length
    if length is None:
        return config
    if not 1 <= length <= longest:
        raise ConfigError(f"--seq-length is {length}, and must be from 1 to {longest}, the model's.")
    return replace(config, model=replace(config.model, seq_length=length))


def score_corpora(job: ScoringJob, tokenizer: Tokenizer, groups: Groups, console: Console) -> list[Path]:
    """Create a sidecar for every corpus of the job, and return their paths. Collective over all ranks.

    Finished sidecars are kept, unfinished ones are continued.

    Raises:
        ConfigError: the model, a corpus or the layout does not match, the sidecar belongs to another job, or the disk
            is full.
        DivergedError: the model computes a NaN or infinite loss.
    """
    config = on_first_rank(lambda: reference_config(job))
    rule = job.rule(config.model.seq_length)
    directory = config.reference.reference_load[0]
    model = ReferenceReplica(config, directory, tokenizer, groups, with_entropy=job.with_entropy)
    fingerprint = on_first_rank(lambda: job.source().fingerprint())
    paths = []
    for prefix in job.corpora:
        path = sidecar_path(prefix, job.name)
        corpus, header, finished = on_first_rank(partial(_open_job, job, tokenizer, prefix, rule, fingerprint))
        paths.append(path)
        if finished:
            console.print(f"{path}: complete, kept")
            continue
        with reserved(path, header) as progress:
            _Scorer(job, model, tokenizer, groups, corpus, path, header, progress).run(console)
    return paths


def _open_job(
    job: ScoringJob, tokenizer: Tokenizer, prefix: str, rule: ContextRule, fingerprint: str
) -> tuple[CorpusInfo, ScoresHeader, bool]:
    """Return the corpus, the header of its sidecar, and whether the sidecar is finished."""
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
    """Score one corpus, continuing from the recorded progress."""

    def __init__(
        self,
        job: ScoringJob,
        model: ReferenceReplica,
        tokenizer: Tokenizer,
        groups: Groups,
        corpus: CorpusInfo,
        path: Path,
        header: ScoresHeader,
        progress: Progress,
    ) -> None:
        self.job, self.model, self.tokenizer, self.groups = job, model, tokenizer, groups
        self.corpus, self.path, self.header, self.progress = corpus, path, header, progress
        self.source = make_row_source(corpus, header.context, job.chunk_tokens)
        self.ids = np.memmap(bin_path(corpus.prefix), corpus.dtype, "r")
        self.clamped, self.recorded = 0, time.monotonic()
        self.writer = SidecarWriter(path, header)
        self.rows_per_pass = MICRO_BATCHES * job.micro_batch_size * groups.dp_size  # over all ranks

    def run(self, console: Console) -> None:
        """Score the remaining rows, and publish the complete file. Collective over all ranks."""
        start, before = time.monotonic(), self.progress.tokens
        name = Path(self.corpus.prefix).name
        shown = self.groups.is_logging_rank
        passes, upcoming = tee(self._passes())
        batches = read_ahead((partial(self._build, rows) for rows, _, _ in upcoming), self.groups.device, ahead=1)
        with closing(batches), progress_bar(f"scoring {name}", self.corpus.tokens, "tokens", enabled=shown) as bar:
            bar.advance(before)
            health.enter("scoring")
            for (rows, chunk, row), micro_batches in zip(passes, batches, strict=True):
                for scored, scores in self._score(rows, micro_batches):
                    self._write(scored, scores)
                tokens = sum(each.stop - each.first for spans in rows for each in spans)
                self.progress = replace(self.progress, chunk=chunk, rows=row, tokens=self.progress.tokens + tokens)
                bar.advance(tokens)
                if self._record_is_due():
                    self._record()
                health.enter("scoring")
        self._record()
        self.writer.close()
        checksum = content_checksum(self.path)
        header = on_first_rank(lambda: finish(self.path, self.header, self.progress, checksum))
        console.print(_summary(self.path, header, time.monotonic() - start, header.tokens - before))

    def _passes(self) -> Iterator[tuple[list[Row], int, int]]:
        """Yield the rows of one pass over all ranks, and the chunk and row count that are then complete."""
        done = self.progress
        remaining = (
            (row, chunk, number + 1)
            for chunk in range(done.chunk, self.source.chunks)
            for number, row in enumerate(self.source.rows(chunk))
            if chunk > done.chunk or number >= done.rows
        )
        while found := list(islice(remaining, self.rows_per_pass)):
            yield [row for row, _, _ in found], *found[-1][1:]

    def _row_groups(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """Return the rows of each micro-batch of this replica."""
        size, stride = self.job.micro_batch_size, self.job.micro_batch_size * self.groups.dp_size
        starts = range(self.groups.dp_rank * size, MICRO_BATCHES * stride, stride)
        return [rows[start : start + size] for start in starts]

    def _build(self, rows: Sequence[Row]) -> list[MicroBatch]:
        """Build this replica's micro-batches on the host."""
        size, window = self.job.micro_batch_size, self.header.context.window
        build = partial(build_micro_batch, ids=self.ids, size=size, window=window, eod=self.tokenizer.eod)
        groups = list(self._row_groups(rows))
        for group in groups:
            check_ids(group, self.ids, self.tokenizer.vocab_size, self.corpus.prefix)
        return [build(group, packed=self.source.packed) for group in groups]

    def _score(
        self, rows: Sequence[Row], micro_batches: Sequence[MicroBatch]
    ) -> list[tuple[Sequence[Row], ReferenceScores]]:
        """Return this replica's rows and scores per micro-batch on the writing rank, an empty list on other ranks."""
        scores = self.model.score(micro_batches)
        writes = self.groups.is_last_stage and self.groups.tp_rank == 0
        return list(zip(self._row_groups(rows), scores, strict=True)) if writes else []

    def _write(self, rows: Sequence[Row], scores: ReferenceScores) -> None:
        losses = scores.loss.cpu().numpy()
        for row, columns, each in scored_positions(rows):
            scored = losses[row, columns]
            self._check_finite(scored, each)
            self.clamped += int((scored > self.header.loss.ceiling).sum())
            self.writer.write_losses(each.first, self.header.loss.encode(scored))
        if self.header.entropy is not None and scores.entropy is not None:
            codes = self.header.entropy.encode(scores.entropy.cpu().numpy())
            for row, columns, each in scored_positions(rows):
                self.writer.write_entropies(each.first, codes[row, columns])

    def _check_finite(self, losses: NDArray[np.float32], scored: Span) -> None:
        if not np.isfinite(losses).all():
            raise DivergedError(
                f"rank {self.groups.rank}: the reference model computes a NaN or infinite loss for a token at "
                f"positions {scored.first} to {scored.stop - 1} of {self.corpus.prefix}."
            )

    def _record_is_due(self) -> bool:
        """Return whether to record progress now, based on the first rank's clock. Collective over all ranks."""
        is_due = time.monotonic() - self.recorded >= self.job.seconds_between_records
        due = torch.tensor(int(is_due), device=self.groups.device)
        dist.broadcast(due, 0)
        return bool(due.item())

    def _record(self) -> None:
        """Flush scores to disk on every rank, then record the progress. Collective over all ranks."""
        health.enter("writing scores", slow=True)
        self.writer.sync()
        clamped = torch.tensor(self.clamped, device=self.groups.device)
        dist.all_reduce(clamped)
        self.progress = replace(self.progress, clamped=self.progress.clamped + int(clamped))
        on_first_rank(lambda: record_progress(self.path, self.progress))
        self.clamped, self.recorded = 0, time.monotonic()


def _summary(path: Path, header: ScoresHeader, seconds: float, tokens: int) -> str:
    return (
        f"{path}: {header.tokens:,} tokens in {format_duration(seconds)} ({tokens / seconds:,.0f} tokens/s), "
        f"{header.clamped:,} clamped to {header.loss.ceiling:.2f} nats, rounding error at most "
        f"{header.loss.max_error:.4f} nats"
    )
