"""Relations of Selective Language Modeling and the reference model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_slm.config.relations.wording import PIPELINE, both_given, data_parallel_size
from megatron_slm.config.schema import ObjectiveConfig, ReferenceConfig, RunConfig
from megatron_slm.config.selection import selects_tokens


def selection_flags(config: RunConfig, _: int) -> Iterator[str]:
    """Refuse selection settings of a run that selects no tokens."""
    objective, reference, defaults = config.objective, config.reference, ObjectiveConfig()
    given = [
        name
        for name, unset in (
            ("--slm-score", objective.slm_score == defaults.slm_score),
            ("--slm-scope", objective.slm_scope == defaults.slm_scope),
            ("--slm-exact-mode", objective.slm_exact_mode == defaults.slm_exact_mode),
            ("--slm-gumbel-temperature", objective.slm_gumbel_temperature == defaults.slm_gumbel_temperature),
            ("--slm-selection-ratio-start", objective.slm_selection_ratio_start is None),
            ("--slm-mix", objective.slm_mix == 0),
            ("--slm-corpus-ratios", not objective.slm_corpus_ratios),
            ("--slm-ratio-gain", objective.slm_ratio_gain is None),
            ("--slm-weight-temperature", objective.slm_weight_temperature is None),
            ("--slm-mtp-selection", objective.slm_mtp_selection == "main"),
            ("--slm-threshold", objective.slm_threshold == "exact"),
            ("--slm-backward", objective.slm_backward == "exact"),
            ("--reference-load", not reference.reference_load),
            ("--reference-scores", not reference.reference_scores),
            ("--reference-history", reference.reference_history is None),
        )
        if not unset
    ]
    if objective.objective == "clm" and given:
        yield f"{' '.join(given)} has no effect with --objective clm. Add --objective slm, or leave it out."
    if objective.objective == "sft" and objective.slm_selection_ratio != defaults.slm_selection_ratio:
        given = ["--slm-selection-ratio", *given]
    if objective.objective == "sft" and given and not selects_tokens(config):
        yield (
            f"{' '.join(given)} has no effect with --objective sft and every answer token selected. Give a reference "
            "model (--reference-load, --reference-scores, --reference-history) or another --slm-score, or leave it out."
        )


def curriculum(config: RunConfig, _: int) -> Iterator[str]:
    """Require a start and one length for the transition of the selection ratio, and bounds that are used."""
    objective, defaults = config.objective, ObjectiveConfig()
    iterations, tokens = objective.slm_selection_ratio_warmup_iters, objective.slm_selection_ratio_warmup_tokens
    flag = "--slm-selection-ratio"
    yield from both_given(f"{flag}-warmup-iters", iterations, f"{flag}-warmup-tokens", tokens)
    has_start = objective.slm_selection_ratio_start is not None
    if has_start and not (iterations or tokens):
        yield f"{flag}-start needs {flag}-warmup-iters or {flag}-warmup-tokens."
    is_stepped = objective.slm_selection_ratio_style == "steps"
    for other, is_used, needed in (
        ("slm_selection_ratio_warmup_iters", has_start, f"{flag}-start"),
        ("slm_selection_ratio_warmup_tokens", has_start, f"{flag}-start"),
        ("slm_selection_ratio_style", has_start, f"{flag}-start"),
        ("slm_selection_ratio_levels", is_stepped, f"{flag}-style steps"),
        ("slm_ratio_min", objective.slm_ratio_gain is not None, "--slm-ratio-gain"),
        ("slm_ratio_max", objective.slm_ratio_gain is not None, "--slm-ratio-gain"),
    ):
        value = getattr(objective, other)
        if value != getattr(defaults, other) and not is_used:
            name = f"--{other.replace('_', '-')}"
            yield f"{name} {value} has no effect without {needed}. Add it, or leave {name} out."


def scopes(config: RunConfig, _: int) -> Iterator[str]:
    """Require a selection scope that supports predicted thresholds or independent MTP heads."""
    objective = config.objective
    if objective.slm_threshold != "exact" and objective.slm_scope != "global-batch":
        yield (
            f"--slm-threshold {objective.slm_threshold} selects over the global batch, and --slm-scope is "
            f"{objective.slm_scope}. Add --slm-scope global-batch, or leave it out."
        )
    has_heads = config.model.mtp_num_layers is not None
    if objective.slm_mtp_selection != "main" and not (has_heads and objective.slm_scope != "global-batch"):
        yield (
            f"--slm-mtp-selection {objective.slm_mtp_selection} needs --mtp-num-layers, and any --slm-scope but "
            "global-batch."
        )


def filtered_backward(config: RunConfig, _: int) -> Iterator[str]:
    """Refuse a filtered backward pass of layers that it does not cover."""
    if config.objective.slm_backward == "exact":
        return
    for flag, given in (
        ("--num-experts", config.model.num_experts is not None),
        ("--mtp-num-layers", config.model.mtp_num_layers is not None),
        ("--slm-mix", config.objective.slm_mix > 0),
    ):
        if given:
            yield f"{flag} needs all gradients, and --slm-backward is filtered. Leave one of them out."


def reference_model(config: RunConfig, _: int) -> Iterator[str]:
    """Require one reference, a model or its scores."""
    reference = config.reference
    paths, names = reference.reference_load, reference.reference_scores
    yield from both_given("--reference-load", paths, "--reference-scores", names, ": the model, or its scores")
    yield from both_given("--reference-load", paths, "--reference-history", reference.reference_history)
    yield from both_given("--reference-scores", names, "--reference-history", reference.reference_history)
    directories = [Path(path).resolve() for path in paths]
    for place, path in enumerate(paths):
        if directories[place] in directories[:place]:
            yield f"--reference-load names the directory of {path} twice. Give each reference model once."
    if reference.reference_ckpt_step is not None and len(paths) > 1:
        yield (
            f"--reference-ckpt-step {reference.reference_ckpt_step} needs one --reference-load. For several, give "
            "the iter_* directories of the steps to --reference-load."
        )
    save = config.checkpoint.save
    if save is not None and Path(save).resolve() in directories and reference.reference_ckpt_step is None:
        yield (
            f"--reference-load {save} is the --save directory of the run, whose newest checkpoint changes. Give one of "
            "its iter_* directories, or use --reference-history."
        )
    if reference.reference_precision is not None and not reference.is_co_located:
        yield (
            f"--reference-precision {reference.reference_precision} has no effect without --reference-load or "
            "--reference-history. Add one of them, or leave it out."
        )
    if reference.reference_ckpt_step is not None and not paths:
        yield (
            f"--reference-ckpt-step {reference.reference_ckpt_step} has no effect without --reference-load. Add "
            "--reference-load, or leave it out."
        )


def history(config: RunConfig, _: int) -> Iterator[str]:
    """Require settings that apply to the kind of history, and weights that can be copied."""
    reference, kind = config.reference, config.reference.reference_history
    if reference.reference_refresh_interval is not None and kind != "start":
        yield (
            f"--reference-refresh-interval {reference.reference_refresh_interval} needs --reference-history start. Add "
            "it, or leave the interval out."
        )
    if reference.reference_average_decay != ReferenceConfig().reference_average_decay and kind != "average":
        yield (
            f"--reference-average-decay {reference.reference_average_decay} needs --reference-history average. Add it, "
            "or leave the decay out."
        )
    if kind is not None and config.precision.fp8_param_gather:
        yield ("--reference-history copies weights, which --fp8-param-gather keeps in FP8 only. Leave one of them out.")


def bubbles(config: RunConfig, world_size: int) -> Iterator[str]:
    """Require a pipeline whose bubbles can hold the passes of a reference model."""
    reference, parallel = config.reference, config.parallel
    if not reference.reference_in_bubbles:
        return
    flag, stages = "--reference-in-bubbles", parallel.pipeline_model_parallel_size
    if not reference.is_co_located:
        yield f"{flag} has no effect without --reference-load. Add --reference-load, or leave it out."
    if len(reference.reference_load) > 1:
        yield f"{flag} needs one --reference-load: the bubbles are planned for one reference model. Leave it out."
    if reference.changes:
        yield (
            f"{flag} needs a reference model that does not change between steps: it scores the next step's "
            "micro-batches before this step's update. Leave it out, or use --reference-history start without "
            "--reference-refresh-interval."
        )
    if stages == 1:
        yield f"{flag} needs {PIPELINE} above 1: without a pipeline there are no bubbles. Leave it out."
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield (
            f"{flag} and --num-layers-per-virtual-pipeline-stage were both given: the interleaved schedule leaves no "
            "bubbles of this length. Give one."
        )
    if config.training.rampup_batch_size:
        yield (
            f"{flag} cannot be combined with --rampup-batch-size: the bubbles are planned for one number of "
            "micro-batches. Leave one of them out."
        )
    samples = config.training.micro_batch_size * data_parallel_size(config, world_size)
    if samples and config.training.global_batch_size // samples < stages:
        yield (
            f"{flag} needs at least as many micro-batches per step as pipeline stages, {stages}, and "
            f"--global-batch-size {config.training.global_batch_size} has "
            f"{config.training.global_batch_size // samples}. Increase it, or leave the flag out."
        )


def sidecar_name_problem(name: str) -> str | None:
    """Return the error for a text that is no name of sidecars, if it is none."""
    if name.endswith((".scores", "/")):
        return (
            f"--reference-scores {name}: omit the suffix .scores and a final slash; NAME names CORPUS.NAME.scores "
            "beside every corpus."
        )
    if not any(character.isalnum() for character in Path(name).name):
        return (
            f"--reference-scores {name}: a name has a letter or a digit. Give the names separated by spaces: "
            "--reference-scores NAME NAME."
        )
    return None


def sidecars(config: RunConfig, _: int) -> Iterator[str]:
    """Require unique sidecar names without suffixes."""
    names = config.reference.reference_scores
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"--reference-scores names {name} twice. Give each sidecar once."
    for name in names:
        if (problem := sidecar_name_problem(name)) is not None:
            yield problem


def combination(config: RunConfig, _: int) -> Iterator[str]:
    """Require several reference models for their combination, and one kind of combination."""
    reference = config.reference
    for flag, value in (
        ("--reference-combine", reference.reference_combine if reference.reference_combine != "mean" else ""),
        ("--reference-corpora", " ".join(reference.reference_corpora)),
    ):
        if value and len(reference.references) < 2:
            yield (
                f"{flag} {value} has no effect without two or more reference models: several directories for "
                "--reference-load, or names for --reference-scores."
            )
    if reference.reference_corpora and reference.reference_combine != "mean":
        yield (
            "--reference-combine and --reference-corpora were both given: tokens of a corpus are scored by one model. "
            "Give one."
        )


RELATIONS = (
    selection_flags,
    curriculum,
    scopes,
    filtered_backward,
    reference_model,
    history,
    bubbles,
    sidecars,
    combination,
)
