"""Comparison of generated text with expected answers."""

from __future__ import annotations

import sys

import pytest

from megatron_slm.evaluation.answers import check_answers_can_be_compared, has_answer
from megatron_slm.evaluation.documents import Task
from megatron_slm.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("answer", "generated", "expected"),
    [
        ("18", " She has 9 eggs and sells them for $2. So the answer is 18.", True),
        ("18", " 16 - 3 = 13. So the answer is 13.", False),
        ("18", "", False),
        (r"The sum is $\boxed{\frac{1}{2}}$.", r"Final Answer: The final answer is $0.5$. I hope it is correct.", True),
        (r"The sum is $\boxed{\frac{1}{2}}$.", r"so we get $\boxed{\frac{1}{3}}$", False),
    ],
)
def test_mathematical_answers(answer: str, generated: str, expected: bool) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    assert has_answer(generated, answer, mathematical=True) == expected


def test_other_answers_are_equal_without_outer_spaces() -> None:
    assert has_answer(" Paris\n", "Paris", mathematical=False)
    assert not has_answer("Paris, France", "Paris", mathematical=False)


def test_a_missing_library_is_named_before_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"task gsm8k .* math-verify.*pip install"):
        check_answers_can_be_compared(Task("gsm8k", [], ("exact_match",), 8, "", is_mathematical=True))
    check_answers_can_be_compared(Task("piqa", [], ("acc",), 0, ""))
