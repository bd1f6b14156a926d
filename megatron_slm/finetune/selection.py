"""Selection over a corpus by one threshold: the loss mask of the answer tokens with the highest excess losses.

    excess lossᵢ  =  base model's lossᵢ − reference model's lossᵢ,    both from sidecars of the context "example"

The ⌈k · answer tokens⌉ tokens of all corpora together with the highest excess loss are selected; among equal scores,
the first ones in the order of the corpora (Token Cleaning, arXiv 2502.01968, with a fixed base model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_slm.config.schema import DataConfig, ReferenceConfig
from megatron_slm.config.selection import ANSWERS, mask_name_problem
from megatron_slm.corpus.checks import check_corpus, check_tokenizer
from megatron_slm.corpus.loss_masks import LossMask, check_mask, check_mask_writable, mask_path, write_mask
from megatron_slm.objective.selection.exact import selected_count
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.scores.sets import CorpusScores, check_scores, open_scores, verify_scores
from megatron_slm.tokenizers.tokenizer import Tokenizer

PART = 1 << 22  # tokens processed together
LOW_BITS = 16
Scores = NDArray[np.float32]


@dataclass(frozen=True)
class SelectionJob:
    """Settings of tools/select_tokens.py."""

    corpora: list[str]  # prefixes
    base_scores: str  # sidecar names
    reference_scores: str
    ratio: float
    name: str  # of the mask
    verify_checksums: bool = True


@dataclass(frozen=True)
class CorpusSelection:
    """Counts of one corpus."""

    prefix: str
    answers: int
    selected: int


@dataclass(frozen=True)
class _Corpus:
    """Hold a corpus with its answers and the scores of both models."""

    prefix: str
    answers: LossMask
    base: CorpusScores
    reference: CorpusScores

    def parts(self, advance: Callable[[float], None]) -> Iterator[tuple[NDArray[np.bool_], Scores]]:
        """Yield the answer mask and the scores of the answer tokens of consecutive parts."""
        tokens = self.answers.header.tokens
        for start in range(0, tokens, PART):
            stop = min(start + PART, tokens)
            mask = self.answers.get(start, stop)
            yield mask, (self.base.losses(start, stop) - self.reference.losses(start, stop))[mask]
            advance(stop - start)


def select_over_corpora(job: SelectionJob, tokenizer: Tokenizer) -> tuple[float, list[CorpusSelection]]:
    """Write the mask of every corpus; return the threshold and the counts.

    Raises:
        ConfigError: a corpus, mask or sidecar is missing, damaged or does not match, or a mask cannot be written.
    """
    corpora = _open(job, tokenizer)
    tokens = sum(corpus.answers.header.tokens for corpus in corpora)
    wanted = selected_count(job.ratio, sum(corpus.answers.header.selected for corpus in corpora))
    with progress("ranking tokens", 2 * tokens, "tokens") as bar:
        threshold, ties = corpus_threshold(lambda: _scores(corpora, bar.advance), wanted)
    found = []
    for corpus in corpora:  # an interruption leaves masks of one threshold only
        mask_path(corpus.prefix, job.name).unlink(missing_ok=True)
    with progress("writing masks", tokens, "tokens") as bar:
        for corpus in corpora:
            chosen = _Chosen(threshold, ties)
            origin = {
                "tool": "select_tokens",
                "base_scores": job.base_scores,
                "reference_scores": job.reference_scores,
                "ratio": job.ratio,
                "threshold": threshold,
            }
            parts = (chosen(mask, scores) for mask, scores in corpus.parts(bar.advance))
            header = write_mask(corpus.prefix, job.name, parts, origin)
            ties = chosen.ties
            found.append(CorpusSelection(corpus.prefix, corpus.answers.header.selected, header.selected))
    return threshold, found


def corpus_threshold(scores: Callable[[], Iterator[Scores]], count: int) -> tuple[float, int]:
    """Return the ``count``-th highest score, and how many of the scores equal to it are among the highest.

    Two passes count the high and the low half of the scores' order keys: memory use is independent of the corpus.

    Args:
        scores: returns an iterator over all scores; called twice.
        count: at least 1, at most the number of scores.
    """
    high = sum(np.bincount(_keys(part) >> LOW_BITS, minlength=1 << LOW_BITS) for part in scores())
    upper, remaining = _bin(np.asarray(high), count)
    low = np.zeros(1 << LOW_BITS, np.int64)
    for part in scores():
        keys = _keys(part)
        low += np.bincount(keys[keys >> LOW_BITS == upper] & ((1 << LOW_BITS) - 1), minlength=1 << LOW_BITS)
    lower, remaining = _bin(low, remaining)
    return float(_value(upper << LOW_BITS | lower)), remaining


class _Chosen:
    """Choose scores above a threshold, and the first ``ties`` of those equal to it."""

    def __init__(self, threshold: float, ties: int) -> None:
        self.threshold, self.ties = np.float32(threshold), ties

    def __call__(self, mask: NDArray[np.bool_], scores: Scores) -> NDArray[np.bool_]:
        """Return the selection of a part, given its answer mask and the scores of its answer tokens."""
        equal = scores == self.threshold
        first = equal & (np.cumsum(equal) <= self.ties)
        self.ties -= int(first.sum())
        selected = np.zeros_like(mask)
        selected[mask] = (scores > self.threshold) | first
        return selected


def _open(job: SelectionJob, tokenizer: Tokenizer) -> list[_Corpus]:
    _check_values(job)
    for prefix in job.corpora:
        check_corpus(prefix, "--data-path")
        check_tokenizer(prefix, tokenizer, "--data-path")
        check_mask(prefix, ANSWERS, verify=job.verify_checksums)
        check_mask_writable(prefix, job.name, "--slm-loss-mask")
    data = DataConfig(data_path=job.corpora, slm_loss_mask=ANSWERS)
    names = [ReferenceConfig(reference_scores=[name]) for name in (job.base_scores, job.reference_scores)]
    headers = [check_scores(name, data, tokenizer, with_entropy=False) for name in names]
    ours, theirs = ({header.reference for header in each.values()} for each in headers)
    if ours == theirs:
        raise ConfigError(
            f"--base-scores {job.base_scores} and --reference-scores {job.reference_scores} contain the losses of the "
            "same model. Give those of the base model and those of the reference model."
        )
    if job.verify_checksums:
        for each in headers:
            verify_scores(each)
    pairs = zip(names, headers, strict=True)
    base, rm = (open_scores(name, each, data, with_entropy=False) for name, each in pairs)
    return [_Corpus(prefix, LossMask(prefix, ANSWERS), base[prefix], rm[prefix]) for prefix in job.corpora]


def _check_values(job: SelectionJob) -> None:
    if not 0 < job.ratio <= 1:
        raise ConfigError(f"--slm-selection-ratio is {job.ratio}, and must be in (0, 1].")
    if (problem := mask_name_problem(job.name)) is not None:
        raise ConfigError(problem)
    if job.name == ANSWERS:
        raise ConfigError(f"--slm-loss-mask {ANSWERS} is the mask of all answers. Choose another name.")
    if job.base_scores == job.reference_scores:
        raise ConfigError("--base-scores and --reference-scores name the same sidecars, so that all scores are 0.")


def _scores(corpora: Sequence[_Corpus], advance: Callable[[float], None]) -> Iterator[Scores]:
    for corpus in corpora:
        yield from (scores for _, scores in corpus.parts(advance))


def _keys(scores: Scores) -> NDArray[np.int64]:
    """Return integers in [0, 2^32) in the order of the scores; -0 equals 0."""
    bits = (scores + np.float32(0)).view(np.uint32).astype(np.int64)
    return np.where(bits >> 31, (1 << 32) - 1 - bits, bits | 1 << 31)


def _value(key: int) -> np.float32:
    """Return the score of a key."""
    bits = key & ((1 << 31) - 1) if key >> 31 else (1 << 32) - 1 - key
    return np.uint32(bits).view(np.float32)


def _bin(counts: NDArray[np.int64], count: int) -> tuple[int, int]:
    """Return the bin of the ``count``-th highest entry, and its place among the entries of that bin, from 1."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, count))
    number = len(counts) - 1 - place
    return number, count - int(above[place] - counts[number])
