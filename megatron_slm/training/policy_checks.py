"""Checks of the selection policy against the other settings of a run; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_slm.config.schema import ObjectiveConfig, ReferenceConfig, RunConfig
from megatron_slm.config.selection import selects_tokens
from megatron_slm.data.blends import parse_corpus_ratios, training_blend
from megatron_slm.objective.selection.policy import (
    OFFSET_LOSS,
    RETROSPECTIVE,
    BooleanOp,
    Policy,
    TopK,
    has_own_ratios,
    needs_reference_entropy,
    needs_reference_loss,
    parse_policy,
    ranks_by_token_loss,
    top_ks,
)
from megatron_slm.scores.combination import Combine, reference_of_corpus


def reference_needs(config: RunConfig) -> tuple[bool, bool]:
    """Return whether the score needs reference losses and reference entropies."""
    if not selects_tokens(config):
        return False, False
    policy = parse_policy(config.objective.slm_score)
    return needs_reference_loss(policy), needs_reference_entropy(policy)


def needs_reference(config: RunConfig) -> bool:
    """Return whether the score needs reference losses or entropies."""
    return any(reference_needs(config))


def unused_reference(config: RunConfig) -> str | None:
    """Return a warning if a reference model is given that the score does not need; the run has none."""
    reference = config.reference
    if config.training.skip_train or needs_reference(config):
        return None
    for flag, value in (
        ("--reference-load", " ".join(reference.reference_load)),
        ("--reference-scores", " ".join(reference.reference_scores)),
        ("--reference-history", reference.reference_history),
    ):
        if value:
            score = config.objective.slm_score
            return f"{flag} {value} is not used: --slm-score {score!r} needs no reference model. Leave {flag} out."
    return None


def unused_ratio(config: RunConfig) -> str | None:
    """Return a warning if a selection ratio is given that no token is selected by; recipes may contain it."""
    objective, ratio = config.objective, config.objective.slm_selection_ratio
    if config.training.skip_train or ratio == ObjectiveConfig().slm_selection_ratio:
        return None
    if not selects_tokens(config):
        reason = f"--objective {objective.objective} trains on all tokens"
    elif has_own_ratios(parse_policy(objective.slm_score)):
        reason = f"every term of --slm-score {objective.slm_score!r} has a ratio"
    elif objective.slm_corpus_ratios and None not in corpus_ratios(config):
        reason = "--slm-corpus-ratios gives every corpus a ratio"
    else:
        return None
    return f"--slm-selection-ratio {ratio:g} is not used: {reason}."


def policy_warnings(config: RunConfig) -> list[str]:
    """Return a warning for each part of the selection policy that is not used."""
    return [warning for warning in (unused_reference(config), unused_ratio(config)) if warning is not None]


def corpus_ratios(config: RunConfig) -> tuple[float | None, ...]:
    """Return the selection ratio of each corpus of the training blend (None: the run's), or () if all have the run's.

    With --skip-train, there is no training blend.

    Raises:
        ConfigError: an invalid ratio or an unknown corpus.
    """
    arguments = config.objective.slm_corpus_ratios
    if not arguments or not selects_tokens(config) or config.training.skip_train:
        return ()
    return parse_corpus_ratios(arguments, training_blend(config.data)[0], "--slm-corpus-ratios")


def score_violations(config: RunConfig) -> Iterator[str]:
    """Yield a message for each setting that conflicts with the score or with another part of the policy.

    With --skip-train, no token is selected.
    """
    objective, reference = config.objective, config.reference
    policy = parse_policy(objective.slm_score)
    if not selects_tokens(config) or config.training.skip_train:
        return
    if needs_reference(config) and not reference.is_co_located and not reference.reference_scores:
        yield (
            f"--slm-score {objective.slm_score!r} needs a reference model. Specify its checkpoint with "
            "--reference-load, sidecars of its scores with --reference-scores, or --reference-history; or use the "
            "score token-loss, token-entropy or random."
        )
    if reference.references:
        of_corpus = reference_of_corpus(reference, config.data)
        Combine.parse(reference.reference_combine, 1 if of_corpus else len(reference.references))
    if config.model.num_experts and objective.slm_scope != "global-batch":
        yield from _unknown_share(objective, policy)
    yield from _unused(objective, policy)
    yield from _speculation(objective, policy)
    yield from _equal_reference(reference, policy)
    yield from _renewed_reference(reference, objective, policy)
    if objective.slm_weight_temperature is not None:
        yield from _single_score("--slm-weight-temperature", objective, policy)
        yield from _needs_exact_threshold("--slm-weight-temperature", objective)
    if objective.slm_corpus_ratios:
        yield from _unused_curriculum(objective, corpus_ratios(config))
        yield from _run_ratio("--slm-corpus-ratios", objective, policy)
        yield from _needs_exact_threshold("--slm-corpus-ratios", objective)
    if objective.slm_ratio_gain is not None:
        yield from _adaptive_ratio("--slm-ratio-gain", objective, policy)


def _unused(objective: ObjectiveConfig, policy: Policy) -> Iterator[str]:
    """Yield a message for each setting of a curriculum or of noise that no term of the score uses."""
    terms = tuple(top_ks(policy))
    for flag, given, is_used, needed in (
        (
            "--slm-selection-ratio-start",
            objective.slm_selection_ratio_start is not None,
            not has_own_ratios(policy),
            "a term without a ratio",
        ),
        (
            "--slm-gumbel-temperature",
            objective.slm_gumbel_temperature != ObjectiveConfig().slm_gumbel_temperature,
            any(term.stochastic for term in terms),
            "a term stochastic-NAME",
        ),
    ):
        if given and not is_used:
            yield (
                f"{flag} has no effect on --slm-score {objective.slm_score!r}: it needs {needed}. Change the score, or "
                f"leave {flag} out."
            )


def _speculation(objective: ObjectiveConfig, policy: Policy) -> Iterator[str]:
    """Yield a message for each setting with which no threshold is estimated, or the estimate is not used."""
    if objective.slm_exact_mode == "recompute":
        return
    for setting, given, reason in (
        (
            f"--slm-score {objective.slm_score!r}",
            not ranks_by_token_loss(policy),
            f"it needs one of the scores {' and '.join(OFFSET_LOSS)}",
        ),
        (
            "--slm-scope global-batch",
            objective.slm_scope == "global-batch",
            "the selection or its threshold is known before the forward pass",
        ),
        ("--slm-mix", objective.slm_mix > 0, "every valid token has a gradient"),
        ("--slm-cross-entropy torch", objective.slm_cross_entropy == "torch", "all logits are kept"),
    ):
        if given:
            yield (
                f"--slm-exact-mode {objective.slm_exact_mode} has no effect with {setting}: {reason}. Use "
                "--slm-exact-mode recompute, or change the other setting."
            )


def _equal_reference(reference: ReferenceConfig, policy: Policy) -> Iterator[str]:
    """Yield a message if the history of the training model is its present weights, so that differences are 0."""
    if not _has_differences(policy):
        return
    for flag, value, is_equal in (
        ("--reference-refresh-interval", reference.reference_refresh_interval, 1),
        ("--reference-average-decay", reference.reference_average_decay, 0),
    ):
        if reference.reference_history is not None and value == is_equal:
            yield (
                f"{flag} {value}: in every step, the reference model has the weights of the training model, and all "
                "excess losses are 0. Increase it."
            )


def _renewed_reference(reference: ReferenceConfig, objective: ObjectiveConfig, policy: Policy) -> Iterator[str]:
    """Yield a message for each setting that depends on the scores of earlier steps, if renewals reset these to 0."""
    if reference.reference_refresh_interval is None or not _has_differences(policy):
        return
    for flag, given, remedy in (
        ("--slm-threshold predicted", objective.slm_threshold == "predicted", "Use --slm-threshold exact"),
        ("--slm-ratio-gain", objective.slm_ratio_gain is not None, "Leave it out"),
    ):
        if given:
            yield (
                f"{flag} depends on the scores of earlier steps, which --reference-refresh-interval "
                f"{reference.reference_refresh_interval} resets to 0 at every renewal. {remedy}, or use "
                "--reference-history average."
            )


def _has_differences(policy: Policy) -> bool:
    """Return whether a score is the difference of token loss and reference loss."""
    return any(term.score in ("excess", RETROSPECTIVE) for term in top_ks(policy))


def _unused_curriculum(objective: ObjectiveConfig, ratios: Sequence[float | None]) -> Iterator[str]:
    if objective.slm_selection_ratio_start is not None and None not in ratios:
        yield (
            "--slm-selection-ratio-start has no effect, since --slm-corpus-ratios gives every corpus a ratio. Leave "
            "out a corpus that is to follow the transition, or leave --slm-selection-ratio-start out."
        )


def _unknown_share(objective: ObjectiveConfig, policy: Policy) -> Iterator[str]:
    """Yield a message if the selected share of a model with experts is unknown before the backward pass."""
    for setting, given in (
        (f"the combined --slm-score {objective.slm_score!r}", isinstance(policy, BooleanOp)),
        ("--slm-corpus-ratios", bool(objective.slm_corpus_ratios)),
    ):
        if given:
            yield (
                f"--num-experts with {setting}: the auxiliary loss is scaled by the selected share, which is known "
                "before the backward pass only with --slm-scope global-batch. Use that scope, or a score with one term "
                "and one ratio."
            )


def _adaptive_ratio(flag: str, objective: ObjectiveConfig, policy: Policy) -> Iterator[str]:
    yield from _single_score(flag, objective, policy)
    yield from _run_ratio(flag, objective, policy)
    yield from _needs_exact_threshold(flag, objective)
    if any(top_k.score == "random" for top_k in top_ks(policy)):
        yield f"{flag} needs a score of the tokens, and --slm-score is random. Use another score, or leave {flag} out."
    for other, given in (
        ("--slm-selection-ratio-start", objective.slm_selection_ratio_start is not None),
        ("--slm-corpus-ratios", bool(objective.slm_corpus_ratios)),
    ):
        if given:
            yield f"{flag} and {other} both determine the selection ratio. Give one."
    if not objective.slm_ratio_min <= objective.slm_selection_ratio <= objective.slm_ratio_max:
        yield (
            f"--slm-selection-ratio {objective.slm_selection_ratio:g}, the first ratio with {flag}, is outside of "
            f"--slm-ratio-min {objective.slm_ratio_min:g} and --slm-ratio-max {objective.slm_ratio_max:g}. Change the "
            "bounds."
        )


def _single_score(flag: str, objective: ObjectiveConfig, policy: Policy) -> Iterator[str]:
    if not isinstance(policy, TopK) or policy.stochastic:
        yield (
            f"{flag} needs one score without noise, and --slm-score is {objective.slm_score!r}. Use one of its scores, "
            f"or leave {flag} out."
        )


def _run_ratio(flag: str, objective: ObjectiveConfig, policy: Policy) -> Iterator[str]:
    if any(top_k.ratio is not None for top_k in top_ks(policy)):
        yield (
            f"{flag} has no effect on the ratios in --slm-score {objective.slm_score!r}. Leave them out, or leave "
            f"{flag} out."
        )


def _needs_exact_threshold(flag: str, objective: ObjectiveConfig) -> Iterator[str]:
    for other, value, remedy in (
        ("--slm-threshold", objective.slm_threshold, "exact"),
        ("--slm-exact-mode", objective.slm_exact_mode, "recompute"),
    ):
        if value != remedy:
            yield f"{flag} ranks exactly, and {other} is {value}. Use {other} {remedy}, or leave {flag} out."
