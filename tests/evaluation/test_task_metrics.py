"""Scores and standard errors, compared with plain definitions."""

from __future__ import annotations

import math
import statistics

import pytest

from megatron_slm.evaluation.documents import Continuation, Document
from megatron_slm.evaluation.metrics import Outcome, Score, mean_score, score_documents

CHOICES = (Continuation("Q: which?\nA:", " a long answer"), Continuation("Q: which?\nA:", " b"))


def test_accuracy_takes_the_first_most_likely_choice() -> None:
    document = Document(CHOICES, gold=1)
    outcomes = [Outcome((-9.0, -2.0), (False, True)), Outcome((-1.0, -1.0), (False, False))]
    scores = score_documents([document, document], outcomes, ("acc",))
    assert scores["acc"] == Score(0.5, 0.5, 2)


def test_normalized_accuracy_divides_by_the_characters_of_the_answer() -> None:
    # per character: -9 / 13 for the first, -2 / 1 for the second; spaces before the answer do not count
    outcome = Outcome((-9.0, -2.0), (False, False))
    scores = score_documents([Document(CHOICES, gold=0)], [outcome], ("acc", "acc_norm"))
    assert scores["acc"].value == 0 and scores["acc_norm"] == Score(1, None, 1)


def test_accuracy_of_one_choice_is_greedy_agreement() -> None:
    documents = [Document((CHOICES[1],))] * 3
    outcomes = [Outcome((-1.0,), (greedy,)) for greedy in (True, False, True)]
    assert score_documents(documents, outcomes, ("acc",))["acc"].value == pytest.approx(2 / 3)


def test_bits_per_byte_and_perplexity() -> None:
    documents = [Document((Continuation("x", text),)) for text in (" é", " abcdef", " a")]
    values = [-1.5, -7.0, -3.0]
    scores = score_documents(
        documents, [Outcome((value,), (False,)) for value in values], ("bits_per_byte", "perplexity")
    )
    assert scores["bits_per_byte"].value == pytest.approx(11.5 / (3 + 7 + 2) / math.log(2))
    assert scores["perplexity"].value == pytest.approx(math.exp(11.5 / 3))
    ratio, sizes = scores["bits_per_byte"].value, [3, 7, 2]
    residuals = [-value / math.log(2) - ratio * size for value, size in zip(values, sizes, strict=True)]
    expected = statistics.stdev(residuals) / math.sqrt(3) / statistics.mean(sizes)
    assert scores["bits_per_byte"].stderr == pytest.approx(expected)


def test_standard_error_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    score = mean_score(values)
    assert score.value == pytest.approx(0.6)
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
