"""Test that scores and texts do not depend on batch, cache and layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.inference.generation import Generation, encode_prompt, generate
from megatron_slm.inference.model import InferenceModel
from megatron_slm.inference.sampling import Decoding
from megatron_slm.inference.scoring import TokenScores, score_tokens
from megatron_slm.testing.inference import opened
from megatron_slm.testing.ranks import run_ranks

PROMPTS = ["abc", "a longer prompt of several words", "", "bad cab", "fed"]
GREEDY = Decoding(max_new_tokens=7, greedy=True)
SAMPLED = Decoding(max_new_tokens=7, temperature=0.5, top_k=50, top_p=0.95, seed=5)
TEXTS = [b"a", b"abc abc hg", b"the longest of the texts, of 37 bytes", b"gh", b"bad cab fed"]
REQUESTS = [ScoringRequest(list(text), first) for text in TEXTS for first in {1, len(text) // 2 or 1}]


class Results(NamedTuple):
    scores: list[TokenScores]
    greedy: list[Generation]
    sampled: list[Generation]


def _results(rank: int, world_size: int, checkpoint: str, layout: dict[str, Any]) -> Results:
    with opened(checkpoint, **layout) as model:
        prompts = [encode_prompt(model.tokenizer, prompt) for prompt in PROMPTS]
        greedy = generate(model, prompts, GREEDY, micro_batch_size=3)
        sampled = generate(model, prompts, SAMPLED, micro_batch_size=2)
        return Results(score_tokens(model, REQUESTS, micro_batch_size=2), greedy, sampled)


def _definition(rank: int, world_size: int, checkpoint: str) -> Results:
    """Return the results for one sequence at a time, without cache and padding."""
    with opened(checkpoint) as model:
        prompts = [encode_prompt(model.tokenizer, prompt) for prompt in PROMPTS]
        sampled = [
            generate(model, [prompt], SAMPLED, first_request=number, use_cache=False)[0]
            for number, prompt in enumerate(prompts)
        ]
        return Results(
            [_score_alone(model, request) for request in REQUESTS],
            [_continue_greedily(model, prompt) for prompt in prompts],
            sampled,
        )


def _logits(model: InferenceModel, tokens: Any) -> torch.Tensor:
    ids = torch.tensor([list(tokens)])
    with torch.no_grad():
        hidden = model.chunks[0](ids, torch.arange(ids.size(1))[None], None)
        return (hidden.heads[0][:, 0] @ hidden.lm_head.weight.t())[:, : model.tokenizer.vocab_size]


def _score_alone(model: InferenceModel, request: ScoringRequest) -> TokenScores:
    labels = torch.tensor(request.tokens[request.first :], dtype=torch.int64)
    logits = _logits(model, request.tokens)[request.first - 1 : -1]
    log_probs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return TokenScores(log_probs.numpy(), (logits.argmax(-1) == labels).numpy())


def _continue_greedily(model: InferenceModel, prompt: list[int]) -> Generation:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + GREEDY.max_new_tokens:
        token = int(_logits(model, tokens)[-1].argmax())
        if token == model.tokenizer.eod:
            break
        tokens.append(token)
    new = tokens[len(prompt) :]
    return Generation(new, model.tokenizer.decode(new))


@pytest.fixture(scope="module")
def definitions(checkpoints: dict[str, str]) -> dict[str, Results]:
    return {kind: run_ranks(_definition, 1, path, initialize=False)[0] for kind, path in checkpoints.items()}


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [
        ("trained", 1, {}),
        ("random", 1, {}),
        ("random", 4, {"tp": 2, "sequence_parallel": True}),
        ("random", 2, {"pp": 2}),
        ("random", 2, {"pp": 2, "virtual_stages": True}),
        ("experts", 4, {"tp": 2, "ep": 2}),
    ],
    ids=str,
)
def test_results_equal_the_definition(
    checkpoints: dict[str, str], definitions: dict[str, Results], kind: str, ranks: int, layout: dict[str, Any]
) -> None:
    expected = definitions[kind]
    for found in run_ranks(_results, ranks, checkpoints[kind], layout, initialize=False):
        assert found.greedy == expected.greedy
        assert found.sampled == expected.sampled
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)
            np.testing.assert_array_equal(ours.is_greedy, theirs.is_greedy)
    if kind == "trained":
        assert any(scores.is_greedy.any() for scores in expected.scores)
    if kind == "random":
        assert all(len(set(generation.tokens)) > 3 for generation in expected.greedy)
