"""Scores of documents and tasks, defined as in lm-evaluation-harness, each with its standard error and count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_slm.evaluation.documents import (
    ACCURACY,
    ACCURACY_NORM,
    BITS_PER_BYTE,
    EXACT_MATCH,
    PERPLEXITY,
    Document,
)


@dataclass(frozen=True)
class Score:
    """Value of one metric of a task."""

    value: float
    stderr: float | None  # standard error of the value; None for a single document
    count: int  # documents


@dataclass(frozen=True)
class Outcome:
    """Results of the model on one document."""

    log_likelihoods: tuple[float, ...] = ()  # of the choices
    greedy: tuple[bool, ...] = ()  # whether each choice is the greedy continuation
    generated: str = ""
    matches: bool = False  # whether the generated text has the expected answer


def score_documents(
    documents: Sequence[Document], outcomes: Sequence[Outcome], metrics: Sequence[str]
) -> dict[str, Score]:
    """Return the scores of a task by metric."""
    pairs = list(zip(documents, outcomes, strict=True))
    scores = {}
    for metric in metrics:
        if metric == BITS_PER_BYTE:
            scores[metric] = _bits_per_byte(pairs)
        elif metric == PERPLEXITY:
            scores[metric] = _perplexity(pairs)
        else:
            scores[metric] = mean_score([MEAN_METRICS[metric](*pair) for pair in pairs])
    return scores


def mean_score(values: Sequence[float]) -> Score:
    """Return the mean with its standard error: the sample standard deviation by the root of the count."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Score(mean, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Score(mean, math.sqrt(variance / count), count)


def is_accurate(document: Document, outcome: Outcome) -> float:
    """Return 1 if the right choice is the most likely one; of a single choice, if it is the greedy continuation."""
    if len(document.choices) == 1:
        return float(outcome.greedy[0])
    return float(_argmax(outcome.log_likelihoods) == document.gold)


def is_accurate_norm(document: Document, outcome: Outcome) -> float:
    """Return 1 if the right choice has the highest log-likelihood per character of the answer."""
    lengths = [max(len(choice.answer), 1) for choice in document.choices]
    return float(
        _argmax([value / length for value, length in zip(outcome.log_likelihoods, lengths, strict=True)])
        == document.gold
    )


MEAN_METRICS: dict[str, Callable[[Document, Outcome], float]] = {
    ACCURACY: is_accurate,
    ACCURACY_NORM: is_accurate_norm,
    EXACT_MATCH: lambda document, outcome: float(outcome.matches),
}


def _argmax(values: Sequence[float]) -> int:
    """Return the first index of the highest value."""
    return max(range(len(values)), key=values.__getitem__)


def _bits_per_byte(pairs: Sequence[tuple[Document, Outcome]]) -> Score:
    """Return −Σ log₂-likelihood of the right choices ÷ Σ their bytes; the standard error is that of a ratio."""
    bits = [-outcome.log_likelihoods[document.gold] / math.log(2) for document, outcome in pairs]
    sizes = [len(document.choices[document.gold].text.encode("utf-8")) for document, _ in pairs]
    ratio = math.fsum(bits) / sum(sizes)
    residuals = mean_score([bit - ratio * size for bit, size in zip(bits, sizes, strict=True)])
    stderr = None if residuals.stderr is None else residuals.stderr * len(sizes) / sum(sizes)
    return Score(ratio, stderr, len(sizes))


def _perplexity(pairs: Sequence[tuple[Document, Outcome]]) -> Score:
    """Return exp of the mean negative log-likelihood of the right choices; its standard error is linearized."""
    mean = mean_score([-outcome.log_likelihoods[document.gold] for document, outcome in pairs])
    value = math.exp(mean.value) if mean.value < 700 else math.inf
    return Score(value, None if mean.stderr is None else value * mean.stderr, mean.count)
