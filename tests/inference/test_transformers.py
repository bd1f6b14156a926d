"""Test that published models score and continue prompts as in the transformers library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.inference.generation import Generation, generate
from megatron_slm.inference.sampling import Decoding
from megatron_slm.inference.scoring import TokenScores, score_tokens
from megatron_slm.testing.inference import opened
from megatron_slm.testing.published import make_model
from megatron_slm.testing.ranks import run_ranks

KINDS = ("llama-3.1", "gpt2", "mixtral")
PROMPTS = [[5], list(range(3, 40, 2)), [7, 200, 31, 9], [250, 250, 1]]
STEPS = 9


def _results(rank: int, world_size: int, paths: list[str]) -> list[tuple[list[Generation], list[TokenScores]]]:
    results = []
    for path in paths:
        with opened(path, tokenizer_type="NullTokenizer", vocab_size=301) as model:
            texts = generate(model, PROMPTS, Decoding(max_new_tokens=STEPS, greedy=True, ignore_eos=True))
            results.append((texts, score_tokens(model, [ScoringRequest(prompt) for prompt in PROMPTS])))
    return results


def _expected(model: Any, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return new.tolist(), log_probs.gather(1, ids[0, 1:, None])[:, 0].numpy()


@pytest.mark.filterwarnings("ignore")
def test_texts_and_scores_equal_those_of_transformers(tmp_path: Path) -> None:
    models = [make_model(kind, vocab_size=301) for kind in KINDS]
    for kind, model in zip(KINDS, models, strict=True):
        model.save_pretrained(tmp_path / kind)
    [results] = run_ranks(_results, 1, [str(tmp_path / kind) for kind in KINDS], initialize=False)
    for kind, model, (texts, scores) in zip(KINDS, models, results, strict=True):
        for prompt, text, score in zip(PROMPTS, texts, scores, strict=True):
            tokens, log_probs = _expected(model, prompt)
            assert text.tokens == tokens, kind
            assert text.text.split() == list(map(str, tokens))
            np.testing.assert_allclose(score.log_probs, log_probs, atol=1e-4)
    assert len({tuple(text.tokens) for texts, _ in results for text in texts}) > 6
