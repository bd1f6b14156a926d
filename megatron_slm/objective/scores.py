"""Scores for ranking tokens.

excess lossᵢ                =  token lossᵢ − reference lossᵢ
retrospective excess lossᵢ  =  reference lossᵢ − token lossᵢ
"""

from __future__ import annotations

from torch import Tensor

from megatron_slm.objective.noise import RANDOM_SCORE, STOCHASTIC_RANKING, gumbel, uniform
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.policy import RETROSPECTIVE, TopK
from megatron_slm.objective.tokens import TokenBatch

LOWEST_TEMPERATURE = 1e-30  # at which noise is lost in rounding; scores divided by a lower one would be infinite


def ranking_scores(tokens: TokenBatch, config: SelectionConfig, top_k: TopK) -> Tensor:
    """Return the scores that ``top_k`` ranks by, [b, s] fp32; 0 for invalid tokens.

    The highest scores are selected, so scores whose lowest values are requested change sign.
    """
    score = _plain_score(tokens, config, top_k.score)
    if top_k.stochastic:
        noise = gumbel(tokens.global_token_index, config.seed, STOCHASTIC_RANKING)
        score = score.double() / max(config.temperature, LOWEST_TEMPERATURE) + top_k.sign * noise
    return (top_k.sign * score).float().masked_fill(~tokens.valid, 0.0)


def _plain_score(tokens: TokenBatch, config: SelectionConfig, name: str) -> Tensor:
    reference = tokens.reference
    if name == "random":
        return uniform(tokens.global_token_index, config.seed, RANDOM_SCORE)
    if name == "token-loss":
        return tokens.loss.detach()
    if name == "token-entropy":
        assert tokens.entropy is not None, "the token losses were computed without entropies"
        return tokens.entropy
    assert reference is not None, f"the score {name} needs a reference model"
    if name == "reference-entropy":
        assert reference.entropy is not None, "the reference model was built without entropies"
        return reference.entropy
    if name == "reference-loss":
        return reference.loss
    if name == "excess":
        return tokens.loss.detach() - reference.loss
    if name == RETROSPECTIVE:
        return reference.loss - tokens.loss.detach()
    raise ValueError(f"the score {name} is unknown")
