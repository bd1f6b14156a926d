"""Run the requests of evaluation tasks on a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from megatron_slm.evaluation.documents import Continuation, Prompt
from megatron_slm.evaluation.encoding import RequestEncoder
from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.inference.generation import generate
from megatron_slm.inference.model import InferenceModel
from megatron_slm.inference.sampling import Decoding
from megatron_slm.inference.scoring import score_tokens
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.errors import DivergedError

BATCHES = 16  # per call of the model and data-parallel rank: requests of similar length share a batch


class Stopped(Exception):
    """Raised if the run must stop before its requests are complete."""


@dataclass(frozen=True)
class RequestRunner:
    """Compute log-likelihoods and generated text for any number of requests. Methods are collective over all ranks."""

    model: InferenceModel  # in evaluation mode
    batch_size: int = 8  # per data-parallel rank
    must_stop: Callable[[], bool] = lambda: False  # collective decision, before each call of the model

    @property
    def encoder(self) -> RequestEncoder:
        """Return the encoder for the model's tokenizer and context."""
        return RequestEncoder(self.model.tokenizer, self.model.context_length)

    def log_likelihoods(self, requests: Sequence[Continuation], label: str) -> list[tuple[float, bool]]:
        """Return the log-likelihood of every continuation, and whether it is the greedy one.

        Raises:
            ConfigError: a continuation has no tokens or exceeds the context length.
        """
        encoder = self.encoder
        return self.score([encoder.continuation(request.context, request.text) for request in requests], label)

    def rolling_log_likelihoods(self, texts: Sequence[str], label: str) -> list[float]:
        """Return the log-likelihood of every text, scored in windows if it exceeds the context length."""
        encoder = self.encoder
        windows = [encoder.windows(text) for text in texts]
        scores = iter(self.score([window for part in windows for window in part], label))
        return [sum(value for value, _ in islice(scores, len(part))) for part in windows]

    def score(self, requests: Sequence[ScoringRequest], label: str) -> list[tuple[float, bool]]:
        """Return the log-likelihood of the scored tokens of every request, and whether all are the greedy ones.

        Raises:
            DivergedError: a log-likelihood is NaN.
            Stopped: ``must_stop`` returned True.
        """
        groups, results = self.model.groups, []
        size = BATCHES * self.batch_size * groups.dp_size * groups.pp_size
        with progress(label, len(requests), "requests", enabled=groups.is_logging_rank) as bar:
            for start in range(0, len(requests), size):
                if self.must_stop():
                    raise Stopped
                part = requests[start : start + size]
                for scores in score_tokens(self.model, part, micro_batch_size=self.batch_size):
                    value = float(scores.log_probs.sum(dtype=float))
                    if math.isnan(value):
                        raise DivergedError(f"{label}: the model computes NaN log-likelihoods. Choose an earlier step.")
                    results.append((value, bool(scores.is_greedy.all())))
                bar.advance(len(part))
        return results

    def generate(self, prompts: Sequence[Prompt], label: str) -> list[str]:
        """Return the greedy continuation of every prompt, before its stop sequences, decoded without the prompt.

        Raises:
            DivergedError: the model computes NaN.
            Stopped: ``must_stop`` returned True.
        """
        groups, encoder = self.model.groups, self.encoder
        tokens = [encoder.prompt(prompt.context, prompt.max_new_tokens) for prompt in prompts]
        results = [""] * len(prompts)
        with progress(f"{label} (generation)", len(prompts), "prompts", enabled=groups.is_logging_rank) as bar:
            for places in _alike(prompts, tokens, self.batch_size * groups.dp_size):
                if self.must_stop():
                    raise Stopped
                first = prompts[places[0]]
                decoding = Decoding(max_new_tokens=first.max_new_tokens, greedy=True, until=first.stop)
                batch = [tokens[place] for place in places]
                found = generate(self.model, batch, decoding, micro_batch_size=self.batch_size, joins_prompt=False)
                for place, result in zip(places, found, strict=True):
                    results[place] = result.text
                bar.advance(len(places))
        return results


def _alike(prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Return batches of prompt indices with equal stop sequences and limits, and similar lengths."""
    kinds: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for place, prompt in enumerate(prompts):
        kinds.setdefault((prompt.stop, prompt.max_new_tokens), []).append(place)
    batches = []
    for places in kinds.values():
        places.sort(key=lambda place: -len(tokens[place]))
        batches += [places[start : start + size] for start in range(0, len(places), size)]
    return batches
