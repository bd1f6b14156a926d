"""Token losses of texts, and the tokens that a policy selects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.inference.model import InferenceModel
from megatron_slm.inference.scoring import score_tokens
from megatron_slm.inference.texts import EncodedTexts
from megatron_slm.objective.scores import ranking_scores
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import select
from megatron_slm.objective.selection.policy import top_ks
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch
from megatron_slm.reference.windows import span, span_count
from megatron_slm.runtime.errors import DivergedError
from megatron_slm.scores.sidecar import ContextRule

Values = NDArray[np.float32]


@dataclass(frozen=True)
class TextLosses:
    """Token losses of texts under one model, and optionally the entropies of its distributions; nats."""

    loss: Values  # [n]
    entropy: Values | None = None  # [n]


@dataclass(frozen=True)
class TextSelection:
    """Selected tokens of texts."""

    selected: NDArray[np.bool_]  # [n]
    score: Values  # [n], of the first top-k of the policy
    threshold: float  # score of the last selected token of this top-k


def score_texts(
    model: InferenceModel,
    texts: EncodedTexts,
    rule: ContextRule,
    *,
    micro_batch_size: int,
    label: str,
    with_entropy: bool = False,
) -> TextLosses:
    """Return the losses of all tokens in the windows of corpus scoring. Collective over all ranks.

    Args:
        rule: context rule "document" of tools/score_corpus.py.
        label: name of the model, for the progress bar and messages.

    Raises:
        DivergedError: a loss is NaN or infinite.
    """
    spans = [
        span(start, stop, number, rule)
        for start, stop in texts.spans
        for number in range(span_count(stop - start, rule))
    ]
    ids, eod = texts.ids, model.tokenizer.eod
    requests = [
        ScoringRequest(
            [eod if each.opens_text else ids[each.start - 1], *ids[each.start : each.stop]],
            first=each.first - each.start + 1,
        )
        for each in spans
    ]
    results = score_tokens(
        model, requests, micro_batch_size=micro_batch_size, label=f"scoring with {label}", with_entropy=with_entropy
    )
    loss, entropy = np.empty(len(ids), np.float32), np.empty(len(ids), np.float32)
    for each, scores in zip(spans, results, strict=True):
        loss[each.first : each.stop] = -scores.log_probs
        if scores.entropy is not None:
            entropy[each.first : each.stop] = scores.entropy
    if not np.isfinite(loss).all():
        place = int(np.isfinite(loss).argmin())
        raise DivergedError(f"{label} computes the loss {loss[place]} for token {place}. Choose another checkpoint.")
    return TextLosses(loss, entropy if with_entropy else None)


def select_tokens(
    losses: TextLosses, reference: TextLosses | None, config: SelectionConfig, ratio: float
) -> TextSelection:
    """Select tokens by the policy of ``config``; all texts together are one ranking.

    Args:
        losses: of the training model.
        reference: of the reference model, if the policy needs one.
    """
    assert config.policy is not None, "there is nothing to rank"
    order = torch.arange(len(losses.loss))[None]
    scores = None
    if reference is not None:
        scores = ReferenceScores(torch.from_numpy(reference.loss)[None], _row(reference.entropy))
    loss, valid = torch.from_numpy(losses.loss)[None], torch.ones_like(order).bool()
    tokens = TokenBatch(loss, valid, order, order, scores, entropy=_row(losses.entropy))
    selection = select(tokens, config, ratio)
    first = next(top_ks(config.policy))
    score = first.sign * ranking_scores(tokens, config, first)
    return TextSelection(selection.selected[0].numpy(), score[0].numpy(), float(selection.threshold))


def _row(values: Values | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values)[None]
