"""The benchmark of the LM head compares equals: every way gives the gradients of the same selected tokens."""

from __future__ import annotations

import pytest
import torch
from baselines.lm_head import WAYS, Problem, Unavailable

SELECTING = [name for name in WAYS if name.startswith("ours") and name != "ours, all tokens"]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.make((96, 16, 130), 0.6, "cpu", torch.float32)


def gradients(problem: Problem, way: str) -> torch.Tensor:
    problem.hidden.grad = problem.weight.grad = None
    WAYS[way].make(problem)()
    assert problem.hidden.grad is not None and problem.weight.grad is not None
    return torch.cat((problem.hidden.grad.flatten(), problem.weight.grad.flatten()))


@pytest.mark.parametrize("way", SELECTING)
def test_every_way_of_ours_has_the_gradients_of_the_standard(problem: Problem, way: str) -> None:
    expected = gradients(problem, "standard")
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(gradients(problem, way), expected, rtol=1e-4, atol=1e-5)


def test_training_on_all_tokens_is_another_job(problem: Problem) -> None:
    assert not torch.allclose(gradients(problem, "ours, all tokens"), gradients(problem, "standard"), rtol=0.1)


@pytest.mark.parametrize("way", ["liger (all tokens)", "cut-cross-entropy", "quack (all tokens)"])
def test_ways_that_cannot_run_here_say_so(problem: Problem, way: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((ImportError, Unavailable)):
        WAYS[way].make(problem)
