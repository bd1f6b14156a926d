"""Test sampling: the chosen token is the quantile of the filtered distribution."""

from __future__ import annotations

import pytest
import torch

from megatron_slm.inference.sampling import Decoding, sample
from megatron_slm.inference.vocabulary import sharded_argmax
from megatron_slm.runtime.errors import ConfigError

LOGITS = torch.tensor([[0.5, 2.0, -1.0, 1.5, 0.0]])
DRAWS = (torch.arange(4000).double() + 0.5) / 4000


def _filtered(decoding: Decoding) -> torch.Tensor:
    """Return the probabilities by the definitions of temperature, top-k and top-p, token by token."""
    probabilities = (LOGITS[0].double() / decoding.temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    if decoding.top_k:
        order = order[: decoding.top_k]
    kept, total = [], 0.0
    share = sum(float(probabilities[token]) for token in order)
    for token in order:
        if total < decoding.top_p:
            kept.append(token)
        total += float(probabilities[token]) / share
    mask = torch.zeros_like(probabilities)
    mask[kept] = probabilities[kept]
    return mask / mask.sum()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_k": 9}, {"top_p": 0.7}, {"top_p": 1e-9}, {"top_k": 3, "top_p": 0.9}],
    ids=str,
)
def test_frequencies_equal_the_filtered_distribution(settings: dict[str, float]) -> None:
    decoding = Decoding(**settings)  # type: ignore[arg-type]
    tokens = sample(LOGITS.expand(len(DRAWS), -1), DRAWS, decoding)
    found = torch.bincount(tokens, minlength=5) / len(DRAWS)
    torch.testing.assert_close(found.double(), _filtered(decoding), atol=1e-3, rtol=0)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    assert sample(logits, torch.tensor([1e-300, 1.0], dtype=torch.double), Decoding()).tolist() == [1, 1]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_extreme_temperatures_have_their_limits(temperature: float) -> None:
    draws = torch.tensor([1e-9, 0.5, 1.0], dtype=torch.double)
    tokens = sample(LOGITS.expand(3, -1), draws, Decoding(temperature=temperature, top_k=1 << 70))
    assert tokens.tolist() == ([1, 1, 1] if temperature < 1 else [1, 0, 2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_without_a_distribution_have_no_token(value: float) -> None:
    logits = torch.tensor([[0.0, value, 1.0], [0.0, 9.0, 1.0]])
    assert sample(logits, torch.ones(2).double() / 2, Decoding(temperature=0.1)).tolist() == [-1, 1]
    if value != value:
        assert sharded_argmax(logits, None).tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0, and must be at least 1."),
        ({"temperature": 0.0}, "--temperature is 0.0, and must be above 0. --greedy takes the most probable token."),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_k": -1}, "--top-k is -1"),
        ({"top_p": 0.0}, "--top-p is 0.0, and must be above 0 and at most 1."),
        ({"greedy": True, "top_k": 5}, "--greedy does not sample"),
        ({"seed": 1 << 63}, "--seed is 9223372036854775808, and must be at least 0"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Decoding(**settings).check()  # type: ignore[arg-type]
