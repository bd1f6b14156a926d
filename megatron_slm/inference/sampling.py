"""Choice of the next token from logits: greedy, or sampling with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.inference.vocabulary import gather_vocabulary, sharded_argmax
from megatron_slm.model.hidden_states import HiddenStates
from megatron_slm.objective.noise import uniform
from megatron_slm.runtime.errors import refuse


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of text generation."""

    max_new_tokens: int = 128
    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0  # sample among the k most probable tokens; 0 for all
    top_p: float = 1.0  # sample among the most probable tokens with this total probability
    seed: int = 1234
    ignore_eos: bool = False  # continue after the end-of-document token
    until: tuple[str, ...] = ()  # texts that end the generation, and are not part of it

    def check(self) -> None:
        """Validate the settings.

        Raises:
            ConfigError: a value is outside of its range, or settings contradict each other.
        """
        refuse(list(self._violations()))

    def _violations(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"--max-new-tokens is {self.max_new_tokens}, and must be at least 1."
        if not 0 < self.temperature < float("inf"):
            yield f"--temperature is {self.temperature}, and must be above 0. --greedy takes the most probable token."
        if self.top_k < 0:
            yield f"--top-k is {self.top_k}, and must be at least 0 (0 samples among all tokens)."
        if not 0 < self.top_p <= 1:
            yield f"--top-p is {self.top_p}, and must be above 0 and at most 1."
        if not 0 <= self.seed < 1 << 63:
            yield f"--seed is {self.seed}, and must be at least 0 and below 2^63."
        if self.greedy and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            yield "--greedy does not sample: leave out --temperature, --top-k and --top-p, or --greedy."


def next_tokens(hidden: HiddenStates, decoding: Decoding, requests: Tensor, step: int) -> Tensor:
    """Return the next token of each sequence, [b] int64, from the hidden states of its last column; -1 without one.

    A sampled token depends on the seed, the number of the request and the step, but not on the batch or the layout.

    Args:
        hidden: hidden states of the last pipeline stage.
        requests: [b] int64, numbers of the requests.
        step: number of tokens that were generated before.
    """
    settings = hidden.lm_head.settings
    logits = hidden.logits(hidden.last_column())
    if decoding.greedy:
        return sharded_argmax(logits, settings.tp_group)
    logits = gather_vocabulary(logits, settings.tp_group)[:, : settings.vocab_size]
    return sample(logits, uniform(requests, decoding.seed, step), decoding)


def sample(logits: Tensor, draws: Tensor, decoding: Decoding) -> Tensor:
    """Return one token per row, at the quantile ``draws`` of the distribution of the remaining tokens, [n] int64.

    Temperature, top-k and top-p apply in this order, as in transformers. At least one token remains; a row with NaN or
    infinite logits has the token -1.

    Args:
        logits: [n, V] fp32.
        draws: [n] float64 in (0, 1].
    """
    logits, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    logits = (logits - logits[:, :1]) / decoding.temperature  # the highest is 0 at any temperature
    if decoding.top_k and decoding.top_k < logits.size(-1):
        logits[:, decoding.top_k :] = -torch.inf
    probabilities = logits.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= decoding.top_p] = 0.0
    totals = probabilities.cumsum(-1)
    places = torch.searchsorted(totals, draws[:, None] * totals[:, -1:]).clamp(max=ids.size(-1) - 1)
    return ids.gather(-1, places)[:, 0].where(logits[:, 0] == 0, -1)
