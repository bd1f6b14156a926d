"""The sidecars that a training run reads: which belong to it, and how several become one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.config.schema import DataConfig, ReferenceConfig
from megatron_slm.data.blends import training_blend
from megatron_slm.data.fingerprints import corpus_fingerprint
from megatron_slm.data.scores.sidecar import FLAG, HEADER_BYTES, TOOL, ScoresHeader, Sidecar, sidecar_path
from megatron_slm.data.tokenizers.tokenizer import Tokenizer
from megatron_slm.runtime.checksums import file_checksums
from megatron_slm.runtime.collective import on_every_rank
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError

COMBINE = "--reference-combine"


@dataclass(frozen=True)
class Combine:
    """How the values of several reference models become one: their lowest, or their weighted mean."""

    weights: tuple[float, ...] | None  # that add up to 1; None takes the lowest

    @staticmethod
    def parse(text: str, count: int) -> Combine:
        """Read ``--reference-combine`` for ``count`` sidecars: "mean", "min", or a weight for each.

        Raises:
            ConfigError: another word, another number of weights, or weights that are not above 0.
        """
        if text == "mean":
            return Combine((1 / count,) * count)
        if text == "min":
            return Combine(None)
        try:
            weights = [float(word) for word in text.split(",")]
        except ValueError:
            raise ConfigError(f"{COMBINE} should be mean, min, or weights such as 0.7,0.3, not {text!r}.") from None
        if len(weights) != count:
            raise ConfigError(f"{COMBINE} {text} has {len(weights)} weights, and {FLAG} names {count} sidecars.")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ConfigError(f"{COMBINE} {text}: every weight must be above 0.")
        return Combine(tuple(weight / sum(weights) for weight in weights))

    def __call__(self, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """One fp32 array from one per sidecar."""
        if len(values) == 1:
            return values[0]
        if self.weights is None:
            return np.minimum.reduce(list(values))
        total = sum(weight * value.astype(np.float64) for weight, value in zip(self.weights, values, strict=True))
        return np.asarray(total, np.float32)


@dataclass(frozen=True)
class CorpusScores:
    """The sidecars of one corpus, as one."""

    sidecars: tuple[Sidecar, ...]
    combine: Combine
    with_entropy: bool

    def losses(self, start: int, stop: int, labels: NDArray[Any]) -> NDArray[np.float32]:
        """Reference losses of the tokens [start, stop) of the corpus, whose ids are ``labels``, nats."""
        return self.combine([sidecar.losses(start, stop, labels) for sidecar in self.sidecars])

    def entropies(self, start: int, stop: int) -> NDArray[np.float32]:
        """Reference entropies of the tokens [start, stop) of the corpus, nats."""
        return self.combine([sidecar.entropies(start, stop) for sidecar in self.sidecars])


ScoreSet = dict[str, CorpusScores]  # by the prefix of the corpus


def open_scores(reference: ReferenceConfig, data: DataConfig, tokenizer: Tokenizer, *, with_entropy: bool) -> ScoreSet:
    """Open the sidecars of every corpus that the run trains on, and make sure that they belong to it.

    Args:
        with_entropy: the score needs entropies.

    Raises:
        ConfigError: a sidecar that is missing, damaged or unfinished, that belongs to another corpus or tokenizer,
            that lacks entropies, or whose reference model or context is not the same over the corpora of a blend.
    """
    names = reference.reference_scores
    combine = Combine.parse(reference.reference_combine, len(names))
    found: ScoreSet = {}
    for prefix in dict.fromkeys(training_blend(data)[0]):
        sidecars = tuple(Sidecar(sidecar_path(prefix, name)) for name in names)
        corpus = corpus_fingerprint(prefix)
        for sidecar in sidecars:
            _check_belongs(sidecar, prefix, corpus, tokenizer, with_entropy)
        found[prefix] = CorpusScores(sidecars, combine, with_entropy)
    first = next(iter(found.values()))
    for scores in found.values():
        for ours, theirs in zip(first.sidecars, scores.sidecars, strict=True):
            _check_alike(ours, theirs)
    return found


def verify_scores(scores: ScoreSet) -> None:
    """Compare the content of all sidecars with their checksums. Collective over all ranks, which share the reading.

    Raises:
        ConfigError: a sidecar is damaged or cannot be read; on every rank.
    """
    sidecars = [sidecar for corpus in scores.values() for sidecar in corpus.sidecars]
    for sidecar in sidecars:
        if sidecar.header.checksum is None:
            notice(
                f"{FLAG}: {sidecar.path} has no checksum (written by an earlier version); its content is not verified."
            )
    sealed = [sidecar for sidecar in sidecars if sidecar.header.checksum is not None]
    found = file_checksums([sidecar.path for sidecar in sealed], FLAG, start=HEADER_BYTES)
    on_every_rank(lambda: _compare_checksums(sealed, found))


def _compare_checksums(sidecars: Sequence[Sidecar], checksums: Sequence[str]) -> None:
    for sidecar, checksum in zip(sidecars, checksums, strict=True):
        if sidecar.header.checksum != checksum:
            raise ConfigError(
                f"{FLAG}: {sidecar.path} is damaged: its content does not match its checksum. Copy it again, or make "
                f"it again with {TOOL}. --no-slm-verify-checksums skips this check."
            )


def recorded_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the name of a tokenizer in a sidecar's header."""
    return f"{tokenizer.name} {tokenizer.fingerprint}"


def _check_belongs(sidecar: Sidecar, prefix: str, corpus: str, tokenizer: Tokenizer, with_entropy: bool) -> None:
    header, path = sidecar.header, sidecar.path
    if header.corpus != corpus:
        raise ConfigError(
            f"{FLAG}: {path} was made for a corpus of fingerprint {header.corpus}, and {prefix} has {corpus}. "
            f"Score the corpus as it is now with {TOOL}."
        )
    ours = recorded_tokenizer(tokenizer)
    if header.tokenizer != ours:
        raise ConfigError(
            f"{FLAG}: {path} was made with the tokenizer {header.tokenizer}, and this run has {ours}. "
            "The reference model must have the run's tokenizer."
        )
    if with_entropy and header.entropy is None:
        raise ConfigError(
            f"{FLAG}: {path} holds no entropies, which this --slm-score needs. Make it again with {TOOL} --entropy."
        )


def _check_alike(first: Sidecar, other: Sidecar) -> None:
    ours: ScoresHeader = first.header
    theirs: ScoresHeader = other.header
    for what, one, two in (
        ("the reference model", ours.reference, theirs.reference),
        ("the context", ours.context, theirs.context),
    ):
        if one != two:
            raise ConfigError(
                f"{FLAG}: {first.path} was made with {what} {one}, and {other.path} with {two}. "
                "All corpora of a blend must be scored alike."
            )
