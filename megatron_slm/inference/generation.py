"""Text generation: tokens that continue prompts, with a key-value cache, in any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from torch import Tensor

from megatron_slm.inference.batches import PromptBatch
from megatron_slm.inference.model import InferenceModel
from megatron_slm.inference.sampling import Decoding, next_tokens
from megatron_slm.inference.text_stream import TextStream
from megatron_slm.mcore.sequence import without_sequence_parallelism
from megatron_slm.model.hidden_states import HiddenStates
from megatron_slm.model.pipeline import run_pipeline
from megatron_slm.runtime.collective import broadcast_from_last_stage
from megatron_slm.runtime.errors import DivergedError
from megatron_slm.tokenizers.tokenizer import Tokenizer

OnText = Callable[[int, str], None]  # receives the index of a prompt and new text
NO_TOKEN = -1  # drawn from logits that are NaN


@dataclass(frozen=True)
class Generation:
    """Continuation of one prompt."""

    tokens: list[int]  # without the token that ended it
    text: str


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a prompt: at least one, and no end-of-document token that the tokenizer appends.

    An empty prompt becomes an end-of-document token, after which texts begin in training.
    """
    ids = tokenizer.encode(prompt)
    if tokenizer.ends_texts and ids[-1:] == [tokenizer.eod]:
        ids = ids[:-1]
    return ids or [tokenizer.eod]


def generate(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    micro_batch_size: int = 8,
    first_request: int = 0,
    on_text: OnText | None = None,
    use_cache: bool = True,
    joins_prompt: bool = True,
) -> list[Generation]:
    """Return the continuation of every prompt, on every rank. Collective over all ranks.

    A continuation ends with a token of the tokenizer's ``end_ids``, at a text of ``decoding.until``, after
    ``max_new_tokens`` tokens, or when prompt and continuation fill the context length.

    Args:
        model: in evaluation mode.
        prompts: the same on every rank, each with at least one token and at most the context length - 1.
        micro_batch_size: prompts per data-parallel rank and forward pass.
        first_request: number of the first prompt, which identifies its random numbers.
        on_text: called on the ranks that generate for a prompt with each piece of new text.
        use_cache: cache keys and values; otherwise every step runs over all tokens.
        joins_prompt: return texts that continue those of the prompts; otherwise, texts of the new tokens alone, which
            some tokenizers decode without their first space.

    Raises:
        DivergedError: the model computes NaN logits; on every rank.
    """
    ranks = model.groups.dp_size
    results: list[Generation] = []
    for start in range(0, len(prompts), micro_batch_size * ranks):
        batch = prompts[start : start + micro_batch_size * ranks]
        size = -(-len(batch) // ranks)
        mine = range(start + size * model.groups.dp_rank, min(start + size * (model.groups.dp_rank + 1), len(prompts)))
        rows = [_Row(model, prompts[index], decoding, index, on_text, joins_prompt=joins_prompt) for index in mine]
        unused = [_Row.unused(model, decoding) for _ in range(size - len(rows))]
        length = max(map(len, batch))
        steps = max(_token_limit(model, prompt, decoding) for prompt in batch)
        cache = StaticInferenceContext(size, length + steps) if use_cache else None
        _Batch(model, [*rows, *unused], length, decoding, first_request, cache).run()
        results += chain.from_iterable(_gather([row.result() for row in rows], model))
        if any(NO_TOKEN in result.tokens for result in results[start:]):
            raise DivergedError("the model computes NaN or infinite logits. Choose an earlier checkpoint.")
    return results


def _token_limit(model: InferenceModel, prompt: Sequence[int], decoding: Decoding) -> int:
    """Return the maximum number of tokens of a continuation."""
    return min(decoding.max_new_tokens, model.context_length - len(prompt))


class _Row:
    """Represent one prompt of a batch and its continuation."""

    def __init__(
        self,
        model: InferenceModel,
        prompt: Sequence[int],
        decoding: Decoding,
        index: int,
        on_text: OnText | None,
        *,
        joins_prompt: bool = True,
    ) -> None:
        self.prompt, self.index, self.tokens, self.text = prompt, index, list[int](), ""
        self.limit = _token_limit(model, prompt, decoding)
        assert prompt and self.limit > 0, "prompts are checked by the caller"
        self.is_done = False
        self._decoding, self._ends = decoding, model.tokenizer.end_ids
        self._stream, self._on_text = TextStream(model.tokenizer, prompt if joins_prompt else []), on_text

    @classmethod
    def unused(cls, model: InferenceModel, decoding: Decoding) -> _Row:
        """Return a row that fills the batch, since data-parallel ranks run the same shapes."""
        row = cls(model, [model.tokenizer.eod], decoding, 0, None)
        row.is_done = True
        return row

    def push(self, token: int) -> None:
        """Append a token unless the row has ended."""
        if self.is_done:
            return
        if token in self._ends and not self._decoding.ignore_eos:
            self._end(self._stream.finish())
            return
        self.tokens.append(token)
        if token == NO_TOKEN:
            self.is_done = True
            return
        new = self._stream.push(token)
        if len(self.tokens) == self.limit:
            self._end(new + self._stream.finish())
        else:
            self._add(new)

    def _end(self, text: str) -> None:
        self.is_done = True
        self._add(text)

    def _add(self, new: str) -> None:
        """Append new text, and end the row before a stop text."""
        self.text += new
        stops = [place for stop in self._decoding.until if (place := self.text.find(stop)) >= 0]
        if stops:
            self.text, self.is_done = self.text[: min(stops)], True
        if self._on_text is None:
            return
        if not self._decoding.until:
            self._on_text(self.index, new)
        elif self.is_done:  # text might become part of a stop text before
            self._on_text(self.index, self.text)

    def result(self) -> Generation:
        return Generation(self.tokens, self.text)


class _Batch:
    """Generate for the rows of one micro-batch on this model replica."""

    def __init__(
        self,
        model: InferenceModel,
        rows: Sequence[_Row],
        length: int,
        decoding: Decoding,
        first_request: int,
        cache: StaticInferenceContext | None,
    ) -> None:
        device, pad = model.groups.device, model.tokenizer.eod
        self.model, self.rows, self.decoding, self.cache = model, rows, decoding, cache
        padded = [[pad] * (length - len(row.prompt)) + list(row.prompt) for row in rows]
        self.tokens = torch.tensor(padded, device=device)
        self.padding = torch.tensor([length - len(row.prompt) for row in rows], device=device)
        self.requests = torch.tensor([first_request + row.index for row in rows], device=device)

    @torch.no_grad()
    def run(self) -> None:
        """Generate until all rows have ended. Collective over the model replica, or all ranks with experts."""
        with without_sequence_parallelism(self.model.chunks):
            self._run()

    def _run(self) -> None:
        step, cached = 0, 0
        while self._is_active():
            last_position = self.model.context_length - 1
            batch = PromptBatch.build(self.tokens, self.padding, cached, last_position)
            tokens = self._next_tokens(batch, step)
            for row, token in zip(self.rows, tokens.tolist(), strict=True):
                row.push(token)
            if self.cache is not None:
                cached = self.tokens.size(1)
                self.cache.increment_sequence_len_offset(batch.sample_length)
                self.cache.enable_decode_mode()
            self.tokens = torch.cat((self.tokens, tokens[:, None].clamp(min=0)), 1)
            step += 1

    def _next_tokens(self, batch: PromptBatch, step: int) -> Tensor:
        """Return the next token of every row, drawn on the last pipeline stage, on every rank of the replica."""
        groups = self.model.groups

        def last_stage(number: int, batch: PromptBatch, hidden: HiddenStates) -> tuple[Tensor, Tensor, Tensor]:
            drawn = next_tokens(hidden, self.decoding, self.requests, step)
            return torch.zeros((), device=groups.device), torch.tensor(1, device=groups.device), drawn

        has_virtual_stages = bool(self.model.config.parallel.num_layers_per_virtual_pipeline_stage)
        copies = groups.pp_size if has_virtual_stages else 1  # the interleaved schedule needs one per stage
        reports = run_pipeline(
            self.model.chunks, [batch] * copies, last_stage, forward_only=True, inference_context=self.cache
        )
        tokens = reports[0] if reports else torch.empty_like(self.requests)
        tokens = broadcast_from_last_stage(tokens, groups.pp)
        if groups.tp_size > 1:
            dist.broadcast(tokens, dist.get_global_rank(groups.tp, 0), group=groups.tp)
        return tokens

    def _is_active(self) -> bool:
        """Return whether a row has not ended. With expert parallelism, replicas run the same number of steps."""
        active = any(not row.is_done for row in self.rows)
        if self.model.config.parallel.expert_model_parallel_size == 1:
            return active
        flag = torch.tensor(int(active), device=self.model.groups.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.model.groups.dp)
        return bool(flag.item())


def _gather(generations: list[Generation], model: InferenceModel) -> list[list[Generation]]:
    """Return the results of every data-parallel rank, in rank order."""
    gathered: list[Any] = [None] * model.groups.dp_size
    dist.all_gather_object(gathered, generations, group=model.groups.dp)
    return gathered
