"""Sidecars of a training run: validation, and combination of several reference models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.config.schema import DataConfig, ReferenceConfig
from megatron_slm.corpus.fingerprints import corpus_fingerprint
from megatron_slm.data.blends import training_blend
from megatron_slm.runtime.checksums import file_checksums
from megatron_slm.runtime.collective import on_every_rank
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.combination import Combine, reference_of_corpus
from megatron_slm.scores.quantization import DTYPE
from megatron_slm.scores.sidecar import (
    EXAMPLE,
    FLAG,
    HEADER_BYTES,
    TOOL,
    ContextRule,
    ScoresHeader,
    Sidecar,
    check_paths_differ,
    read_header,
    rescore_command,
    sidecar_path,
)
from megatron_slm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class CorpusScores:
    """Combined sidecars of one corpus."""

    sidecars: tuple[Sidecar, ...]
    combine: Combine
    with_entropy: bool

    def losses(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the reference losses of the tokens [start, stop) of the corpus, in nats."""
        return self.combine.arrays([sidecar.losses(start, stop) for sidecar in self.sidecars])

    def entropies(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the reference entropies of the tokens [start, stop) of the corpus, in nats."""
        return self.combine.arrays([sidecar.entropies(start, stop) for sidecar in self.sidecars])


ScoreSet = dict[str, CorpusScores]  # by corpus prefix
Headers = dict[Path, ScoresHeader]  # by sidecar path


def open_scores(reference: ReferenceConfig, headers: Headers, data: DataConfig, *, with_entropy: bool) -> ScoreSet:
    """Memory-map the sidecars of all training corpora.

    Args:
        headers: result of :func:`check_scores`.

    Raises:
        ConfigError: a sidecar is missing or truncated on this host.
    """
    return {
        prefix: CorpusScores(
            tuple(Sidecar(path, headers[path]) for path in (sidecar_path(prefix, name) for name in names)),
            Combine.parse(reference.reference_combine, len(names)),
            with_entropy,
        )
        for prefix, names in sidecar_names(reference, data).items()
    }


def sidecar_names(reference: ReferenceConfig, data: DataConfig) -> dict[str, list[str]]:
    """Return the names of the sidecars of each training corpus: all, or one with ``--reference-corpora``."""
    names, prefixes = reference.reference_scores, training_blend(data)[0]
    chosen = reference_of_corpus(reference, data)
    return {prefix: [names[chosen[place]]] if chosen else names for place, prefix in enumerate(prefixes)}


def check_scores(reference: ReferenceConfig, data: DataConfig, tokenizer: Tokenizer, *, with_entropy: bool) -> Headers:
    """Validate the sidecars of all training corpora, and return their headers.

    Args:
        with_entropy: whether the score requires entropies.

    Raises:
        ConfigError: a sidecar is missing, damaged, unfinished, of a former format, of another corpus or tokenizer, or
            without required entropies; the reference model or context differs between the corpora of a blend; or two
            sidecars of a corpus are of one reference model and context.
    """
    named = sidecar_names(reference, data)
    corpora = {prefix: corpus_fingerprint(prefix) for prefix in named}
    found: Headers = {}
    for name in reference.reference_scores:
        prefixes = [prefix for prefix, names in named.items() if name in names]
        check_paths_differ(prefixes, name)
        first = sidecar_path(prefixes[0], name)
        for prefix in prefixes:
            path = sidecar_path(prefix, name)
            header = found[path] = read_header(path)
            _check_format(path, header, rescore_command(prefixes, name, header, with_entropy=with_entropy))
            _check_belongs(path, header, prefix, corpora[prefix], tokenizer)
            if with_entropy and header.entropy is None:
                raise ConfigError(
                    f"{FLAG}: {path} has no entropies, which this --slm-score requires. Remove it, and recreate it "
                    f"with {TOOL} --entropy."
                )
            _check_context(path, header, data)
            _check_alike(first, found[first], path, header)
    for prefix, names in named.items():
        _check_differ([sidecar_path(prefix, name) for name in names], found)
    return found


def verify_scores(headers: Headers) -> None:
    """Verify the checksums of all sidecars. Collective over all ranks, which share the reading.

    Raises:
        ConfigError: a sidecar is damaged or cannot be read; on every rank.
    """
    for path, header in headers.items():
        if header.checksum is None:
            notice(f"{FLAG}: {path} has no checksum (written by an earlier version); its content is not verified.")
    recorded = {path: header.checksum for path, header in headers.items() if header.checksum is not None}
    found = file_checksums(list(recorded), FLAG, start=HEADER_BYTES)
    on_every_rank(lambda: _compare_checksums(recorded, found))


def _compare_checksums(recorded: dict[Path, str], found: Sequence[str]) -> None:
    for (path, wanted), checksum in zip(recorded.items(), found, strict=True):
        if checksum != wanted:
            raise ConfigError(
                f"{FLAG}: {path} is damaged: its content does not match its checksum. Copy it again, or remove it and "
                f"recreate it with {TOOL}. --no-slm-verify-checksums skips this check."
            )


def recorded_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the tokenizer description recorded in sidecar headers."""
    return f"{tokenizer.name} {tokenizer.fingerprint}"


def _check_format(path: Path, header: ScoresHeader, rescore: str) -> None:
    if header.bytes_per_value != DTYPE.itemsize:
        raise ConfigError(
            f"{FLAG}: {path} has the one-byte format of earlier releases, which is no longer supported. Score the "
            f"corpora again, with the reference model of fingerprint {header.reference} as CHECKPOINT:\n  {rescore}"
        )


def _check_context(path: Path, header: ScoresHeader, data: DataConfig) -> None:
    """Raise ConfigError if the tokens were scored in another context than that of this run's objective."""
    is_example = header.context.kind == EXAMPLE
    if is_example != (data.slm_loss_mask is not None):
        wanted, run = ("document", "pretraining") if is_example else (EXAMPLE, "--objective sft")
        raise ConfigError(
            f"{FLAG}: {path} was made with the context {header.context.kind}, which does not apply to {run}. Score the "
            f"corpora under another name with {TOOL} --context {wanted}."
        )


def _check_belongs(path: Path, header: ScoresHeader, prefix: str, corpus: str, tokenizer: Tokenizer) -> None:
    if header.corpus != corpus:
        raise ConfigError(
            f"{FLAG}: {path} was made for a corpus of fingerprint {header.corpus}, but {prefix} has {corpus}. "
            f"Remove the sidecar, and score the current corpus with {TOOL}."
        )
    ours = recorded_tokenizer(tokenizer)
    if header.tokenizer != ours:
        raise ConfigError(
            f"{FLAG}: {path} was made with the tokenizer {header.tokenizer}, but this run uses {ours}. "
            "The reference model must have the run's tokenizer."
        )
    if header.eod not in (None, tokenizer.eod):
        raise ConfigError(
            f"{FLAG}: {path} was made with the end-of-document id {header.eod}, but this run uses {tokenizer.eod}. "
            f"Set --eod-id {header.eod}, or remove the sidecar and recreate it with {TOOL} --eod-id {tokenizer.eod}."
        )


def _check_differ(paths: Sequence[Path], headers: Headers) -> None:
    """Raise ``ConfigError`` if two sidecars of a corpus are of one reference model and context."""
    seen: dict[tuple[str, ContextRule], Path] = {}
    for path in paths:
        other = seen.setdefault((headers[path].reference, headers[path].context), path)
        if other is not path:
            raise ConfigError(
                f"{FLAG}: {other} and {path} contain the scores of the same reference model and context. Give one."
            )


def _check_alike(first: Path, ours: ScoresHeader, other: Path, theirs: ScoresHeader) -> None:
    for subject, one, two in (
        ("the reference model", ours.reference, theirs.reference),
        ("the context", ours.context, theirs.context),
    ):
        if one != two:
            raise ConfigError(
                f"{FLAG}: {first} was made with {subject} {one}, but {other} with {two}. "
                "Score all corpora of a blend with the same reference model and context."
            )
