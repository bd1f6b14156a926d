"""Log-probabilities of given tokens, for any number of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_slm.inference.batches import ScoringBatch, ScoringRequest
from megatron_slm.inference.model import InferenceModel
from megatron_slm.inference.vocabulary import sharded_argmax
from megatron_slm.model.gpt import model_config
from megatron_slm.model.hidden_states import HiddenStates
from megatron_slm.model.pipeline import run_pipeline
from megatron_slm.objective.cross_entropy import vocab_parallel_token_loss
from megatron_slm.runtime.collective import all_reduce_sum, broadcast_from_last_stage
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.health.progress import progress as health

LOGIT_BYTES = 64 << 20  # of logits in memory at a time
MICRO_BATCHES = 4  # per pass and pipeline stage


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of one request, from its ``first`` on."""

    log_probs: NDArray[np.float32]  # natural logarithm
    is_greedy: NDArray[np.bool_]  # whether the token has the highest probability
    entropy: NDArray[np.float32] | None = None  # of the distributions that predict the tokens, nats; on request


def score_tokens(
    model: InferenceModel,
    requests: Sequence[ScoringRequest],
    *,
    micro_batch_size: int = 8,
    label: str | None = None,
    with_entropy: bool = False,
) -> list[TokenScores]:
    """Return the scores of every request, on every rank. Collective over all ranks.

    Data-parallel ranks divide the requests, which are sorted by length, so that little is padded.

    Args:
        model: in evaluation mode.
        requests: the same on every rank; their lengths are at most the context length + 1.
        micro_batch_size: sequences per data-parallel rank and forward pass.
        label: description of a progress bar; None for no bar.
        with_entropy: also compute entropies.
    """
    results: list[TokenScores | None] = [None] * len(requests)
    longest_first = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
    shown = label is not None and model.groups.is_logging_rank
    with progress(label or "", len(requests), "sequences", enabled=shown) as bar:
        for places in _passes(longest_first, micro_batch_size, model):
            health.enter("scoring")
            rows = [requests[place] for place in places]
            for place, scores in zip(places, _score_pass(model, rows, micro_batch_size, with_entropy), strict=True):
                results[place] = scores
            bar.advance(len(places))
    health.enter("evaluating scores", slow=True)
    return [scores for scores in results if scores is not None]


def _passes(order: Sequence[int], micro_batch_size: int, model: InferenceModel) -> Iterator[Sequence[int]]:
    """Yield the requests of each pass over all data-parallel ranks."""
    size = micro_batch_size * MICRO_BATCHES * model.groups.pp_size * model.groups.dp_size
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def _score_pass(
    model: InferenceModel, rows: Sequence[ScoringRequest], micro_batch_size: int, with_entropy: bool
) -> list[TokenScores]:
    """Score the requests of one pass, and share the scores with all data-parallel ranks."""
    groups = model.groups
    ranks = groups.dp_size
    batches = _micro_batches(model, rows, micro_batch_size)
    reports = run_pipeline(model.chunks, batches, partial(_token_scores, with_entropy), forward_only=True)
    counts = [sum(row.scored for row in rows[rank::ranks]) for rank in range(ranks)]
    values = torch.zeros(2 + with_entropy, max(counts), device=groups.device)
    if reports:
        values[:, : counts[groups.dp_rank]] = torch.cat(reports, 1)
    shared = [torch.empty_like(values) for _ in range(ranks)]
    all_reduce_sum(broadcast_from_last_stage(values, groups.pp), groups.cp)
    dist.all_gather(shared, values, group=groups.dp)
    results: list[TokenScores | None] = [None] * len(rows)
    for rank, part in enumerate(shared):
        local = part.cpu().numpy()
        start = 0
        for place in range(rank, len(rows), ranks):
            stop = start + rows[place].scored
            losses, greedy, *entropy = local[:, start:stop]
            results[place] = TokenScores(-losses, greedy > 0, *entropy)
            start = stop
    return [scores for scores in results if scores is not None]


def _micro_batches(model: InferenceModel, rows: Sequence[ScoringRequest], micro_batch_size: int) -> list[ScoringBatch]:
    """Return this rank's micro-batches; their shape and number are the same on all data-parallel ranks.

    Expert-parallel ranks exchange tokens, the interleaved schedule needs a multiple of the pipeline stages, and
    context-parallel ranks hold two chunks of each sequence.
    """
    groups, parallel = model.groups, model.config.parallel
    per_rank = -(-len(rows) // groups.dp_size)
    size = min(micro_batch_size, per_rank)
    count = -(-per_rank // size)
    if parallel.num_layers_per_virtual_pipeline_stage:
        count = -(-count // groups.pp_size) * groups.pp_size
    length = max(1, *(len(row.tokens) - 1 for row in rows))
    divisor = 2 * groups.cp.size() if groups.cp.size() > 1 else 1
    if model_config(list(model.chunks)).sequence_parallel:
        divisor *= groups.tp_size
    length = -(-length // divisor) * divisor
    local = rows[groups.dp_rank :: groups.dp_size]
    return [
        ScoringBatch.build(local[start : start + size], size, length, model.tokenizer.eod, groups)
        for start in range(0, count * size, size)
    ]


def _token_scores(
    with_entropy: bool, number: int, batch: ScoringBatch, hidden: HiddenStates
) -> tuple[Tensor, Tensor, Tensor]:
    """Return token losses, greedy matches and entropies of a micro-batch, [2 or 3, n] fp32, on the last pipeline stage.

    Those of other context-parallel ranks are 0.
    """
    settings = hidden.lm_head.settings
    selected, labels = hidden.select(batch.scored), batch.labels[batch.scored]
    rows = max(1, LOGIT_BYTES // (4 * hidden.lm_head.output_size_per_partition))
    parts = [torch.empty(2, 0, device=labels.device)]
    for start in range(0, len(labels), rows):
        logits, targets = hidden.logits(selected[start : start + rows]), labels[start : start + rows]
        loss = vocab_parallel_token_loss(logits, targets, settings.tp_group, settings.vocab_size)
        parts.append(torch.stack((loss, (sharded_argmax(logits, settings.tp_group) == targets).float())))
    scores = torch.zeros(2 + with_entropy, batch.count, device=labels.device)
    scores[:2, batch.places[batch.scored]] = torch.cat(parts, 1)
    if with_entropy:
        entropy = hidden.token_losses(batch.labels, with_entropy=True).entropy
        assert entropy is not None
        scores[2, batch.places[batch.scored]] = entropy[batch.scored]
    return scores[0].sum(), torch.tensor(len(labels), device=labels.device), scores
