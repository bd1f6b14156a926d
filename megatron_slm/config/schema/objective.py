"""Settings of Selective Language Modeling and the reference model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.constraints import flag
from megatron_slm.config.schema.training import PARAMS_DTYPES

LARGEST_TOKENS = 2**53  # consumed tokens are exact as floating-point numbers


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Selective Language Modeling"""

    objective: str = flag(
        "clm",
        "training objective; clm: train on all tokens; slm: train on selected tokens; sft: train on the answers of "
        "examples from tools/preprocess_sft.py, or on selected tokens of them if a reference or a score is given",
        choices=("clm", "slm", "sft"),
    )
    slm_selection_ratio: float = flag(
        0.6,
        "fraction k of the valid tokens to select, in (0, 1]",
        above=0,
        at_most=1,
        example="0.6 (the paper's for 1B)",
    )
    slm_score: str = flag(
        "excess",
        "token score: excess, retrospective-excess (its negative), token-loss, token-entropy, reference-loss, "
        "reference-entropy (both lowest first), random, stochastic-NAME; or scores with individual ratios, combined by "
        "and/or: 'reference-loss:0.7 and reference-entropy:0.7'",
    )
    slm_scope: str = flag(
        "data-parallel",
        "set of tokens to rank together",
        choices=("sequence", "micro-batch", "data-parallel", "global-batch"),
    )
    slm_threshold: str = flag(
        "exact",
        "threshold with --slm-scope global-batch; exact: an additional forward pass ranks all tokens of the step "
        "first; predicted: predict it from earlier steps and control the selected fraction",
        choices=("exact", "predicted"),
    )
    slm_selection_ratio_start: float | None = flag(
        None, "selection ratio of the first iteration", above=0, at_most=1, example="0.6 (the paper's for 1B)"
    )
    slm_selection_ratio_warmup_iters: int = flag(
        0,
        "number of iterations of the transition from --slm-selection-ratio-start to --slm-selection-ratio",
        at_least=0,
    )
    slm_selection_ratio_warmup_tokens: int = flag(
        0,
        "number of tokens of the transition, instead of --slm-selection-ratio-warmup-iters",
        at_least=0,
        at_most=LARGEST_TOKENS,
    )
    slm_selection_ratio_style: str = flag("linear", "shape of the transition", choices=("linear", "cosine", "steps"))
    slm_selection_ratio_levels: int = flag(
        4, "number of constant levels before the final ratio with --slm-selection-ratio-style steps", above=0
    )
    slm_corpus_ratios: list[str] = flag(
        list,
        "selection ratios of corpora of the blend, which are then ranked separately: ratio corpus ratio corpus ..., "
        "each corpus by its prefix or the last part of it; other corpora have --slm-selection-ratio",
    )
    slm_ratio_gain: float | None = flag(
        None,
        "adapt the selection ratio to the mean score of the selected tokens (risk): multiply it by exp(gain x change "
        "of the risk in nats) after each step",
        above=0,
        example="0.5",
    )
    slm_ratio_min: float = flag(0.1, "lowest selection ratio with --slm-ratio-gain", above=0, at_most=1)
    slm_ratio_max: float = flag(1.0, "highest selection ratio with --slm-ratio-gain", above=0, at_most=1)
    slm_weight_temperature: float | None = flag(
        None,
        "temperature in nats of softmax weights: each selected token's loss is weighted by exp(score/temperature), "
        "with a mean weight of 1; default equal weights",
        above=0,
    )
    slm_mix: float = flag(
        0.0, "fraction of the loss weight to spread evenly over all valid tokens, as in CLM", at_least=0, at_most=1
    )
    slm_mtp_selection: str = flag(
        "main",
        "selection of the MTP heads; main: use the tokens that the main head selects; independent: rank the losses of "
        "each MTP head separately",
        choices=("main", "independent"),
    )
    slm_gumbel_temperature: float = flag(1.0, "temperature of stochastic selection", above=0)
    slm_cross_entropy: str | None = flag(
        None,
        "implementation of the LM head's cross entropy; torch keeps all logits in memory, chunked and triton one chunk "
        "at a time; default triton on a GPU if it is installed, else chunked",
        choices=("torch", "chunked", "triton"),
    )
    slm_exact_mode: str = flag(
        "recompute",
        "when to compute the LM-head gradient of selected tokens; recompute: in the backward pass; speculative: in the "
        "forward pass for tokens above an estimated threshold. The selection is identical. For the scores excess and "
        "token-loss, except with --slm-scope global-batch, which needs no estimate",
        choices=("recompute", "speculative"),
    )
    slm_backward: str = flag(
        "exact",
        "backward pass of the layers; exact: gradients of all tokens; filtered: an approximation in which the MLP, the "
        "query projection and the output projection propagate gradients of selected tokens only",
        choices=("exact", "filtered"),
    )
    slm_saved_logits_mb: int | None = flag(
        None,
        "maximum MiB of logits per rank and micro-batch to save instead of recomputing them; default 64 on a CPU and "
        "2048 on a GPU",
        at_least=0,
    )
    slm_z_loss: float = flag(
        0.0, "coefficient of the z-loss of selected tokens, (log-sum-exp of the logits)^2", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Reference model"""

    reference_load: list[str] = flag(
        list,
        "checkpoint directory of the reference model, or directory of a published model; several are several models, "
        "which all run in every step",
    )
    reference_ckpt_step: int | None = flag(
        None, "checkpoint iteration of the reference model; default the newest", at_least=0
    )
    reference_history: str | None = flag(
        None,
        "reference model from the training model's history, instead of --reference-load: a copy of its weights at the "
        "start of the run, or their exponential moving average; saved with checkpoints",
        choices=("start", "average"),
    )
    reference_average_decay: float = flag(
        0.999, "with --reference-history average: weight of the previous average in each step", at_least=0, below=1
    )
    reference_refresh_interval: int | None = flag(
        None,
        "with --reference-history start: copy the training model's weights again after every this many steps",
        at_least=1,
    )
    reference_precision: str | None = flag(
        None, "precision of the reference model; default that of the training model", choices=PARAMS_DTYPES
    )
    reference_fp8: bool = flag(
        False,
        "keep the linear layers of the frozen reference model in FP8 only, 1 byte per parameter; requires Transformer "
        "Engine, and --fp8-recipe tensorwise or blockwise",
    )
    reference_in_bubbles: bool = flag(
        False,
        "score the next step's micro-batches in the pipeline bubbles of this step instead of a separate pass; the "
        "losses are identical",
    )
    reference_scores: list[str] = flag(
        list,
        "names of score sidecars from tools/score_corpus.py, instead of --reference-load; NAME refers to "
        "CORPUS.NAME.scores next to each corpus, DIRECTORY/NAME to the same file in DIRECTORY",
    )
    reference_combine: str = flag(
        "mean",
        "combination of the losses of several reference models or sidecars: mean, min, or weights such as 0.7,0.3",
    )
    reference_corpora: list[str] = flag(
        list,
        "instead of --reference-combine, pairs of a reference model or sidecar and a corpus of the blend, of which it "
        "scores the tokens: rm-web web rm-math math",
    )

    @property
    def is_co_located(self) -> bool:
        """Return whether a reference model runs on the ranks of the training model."""
        return bool(self.reference_load) or self.reference_history is not None

    @property
    def references(self) -> list[str]:
        """Return the names of the reference models: checkpoint directories or sidecars."""
        return self.reference_load or self.reference_scores

    @property
    def changes(self) -> bool:
        """Return whether the reference model changes during the run."""
        return self.reference_history == "average" or self.reference_refresh_interval is not None
