"""Test that all implementations of the LM-head benchmark compute the gradients of the same selected tokens."""

from __future__ import annotations

import pytest
import torch
from baselines.lm_head import IMPLEMENTATIONS, Problem, Unavailable

SELECTING = [name for name in IMPLEMENTATIONS if name.startswith("ours") and name != "ours, all tokens"]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.make((96, 16, 130), 0.6, "cpu", torch.float32)


def gradients(problem: Problem, implementation: str) -> torch.Tensor:
    problem.hidden.grad = problem.weight.grad = None
    IMPLEMENTATIONS[implementation].make(problem)()
    assert problem.hidden.grad is not None and problem.weight.grad is not None
    return torch.cat((problem.hidden.grad.flatten(), problem.weight.grad.flatten()))


@pytest.mark.parametrize("implementation", SELECTING)
def test_gradients_agree_with_standard_cross_entropy(problem: Problem, implementation: str) -> None:
    expected = gradients(problem, "standard")
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(gradients(problem, implementation), expected, rtol=1e-4, atol=1e-5)


def test_training_on_all_tokens_has_other_gradients(problem: Problem) -> None:
    assert not torch.allclose(gradients(problem, "ours, all tokens"), gradients(problem, "standard"), rtol=0.1)


@pytest.mark.parametrize("implementation", ["liger (all tokens)", "cut-cross-entropy", "quack (all tokens)"])
def test_unavailable_implementations_raise(problem: Problem, implementation: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((ImportError, Unavailable)):
        IMPLEMENTATIONS[implementation].make(problem)
