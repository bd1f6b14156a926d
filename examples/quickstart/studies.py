"""Studies of Selective Language Modeling at quickstart size: their variants, reference models and controls.

A study compares variants that start from one base and read the same tokens. Variants of equal names are shared by
studies, and trained once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

BASE, REFERENCE = "compare-base", "compare-rm"
BASE_STEPS, STEPS, SCOPE_STEPS = 100, 160, 80
RATIO = 0.6
SELECTED_STEPS = round(RATIO * STEPS)  # steps of as many tokens as SLM selects
POOL, SELECTED = "raw_pool", "raw_selected"  # documents to select from, and those selected (study_corpora.py)
GENERAL = ("6", "general_text", "3", "general_code", "1", "clean_train")  # mix of section 3.1
SLM = ("--objective", "slm", "--slm-selection-ratio", str(RATIO))


@dataclass(frozen=True)
class Reference:
    """Represent a reference model: its corpus, steps, and architecture if it differs from the base's."""

    corpus: str
    steps: int
    flags: Sequence[str] = ()  # of a smaller model, which gets a base model of its size


@dataclass(frozen=True)
class Variant:
    """Represent a compared variant: its flags, reference model, ranks, steps and corpora."""

    flags: Sequence[str]
    reference: str | None = REFERENCE
    ranks: int = 1
    steps: int = STEPS
    blend: Sequence[str] = ("raw_train",)  # one corpus, or weights and corpora in turn


@dataclass(frozen=True)
class Study:
    """Represent a study: variants, the one that others are compared with, and its plot."""

    variants: dict[str, Variant]
    baseline: str
    plot: str | None = None  # curves: held-out loss over tokens; trade-off: final clean over raw loss


REFERENCES = {
    # three passes over the clean corpus (section 3.1): 3 x 1.69 million tokens / 4,096
    REFERENCE: Reference("clean_train", 1242),
    # a third of the raw corpus: self-reference (appendix H)
    "compare-raw-rm": Reference("raw_train", 360),
    # a sixth of θ's parameters without embeddings (appendix I)
    "compare-small-rm": Reference(
        "clean_train", 1242, ("--num-layers", "2", "--hidden-size", "96", "--ffn-hidden-size", "224")
    ),
}
OBJECTIVES = {
    "CLM": Variant(("--objective", "clm"), reference=None),
    "SLM": Variant(SLM),
    "random": Variant((*SLM, "--slm-score", "random"), reference=None),
}
RECOMPUTE = (*SLM, "--slm-saved-logits-mb", "0")  # otherwise logits of this size are saved in every mode
SCOPES = {
    f"SLM, {scope}": Variant((*SLM, "--micro-batch-size", "4", "--slm-scope", scope), ranks=2, steps=SCOPE_STEPS)
    for scope in ("micro-batch", "data-parallel", "global-batch")
}
SCOPES["SLM, global-batch, predicted"] = replace(
    SCOPES["SLM, global-batch"], flags=(*SCOPES["SLM, global-batch"].flags, "--slm-threshold", "predicted")
)


def _ratio(ratio: float, *flags: str, reference: str | None = REFERENCE) -> Variant:
    return Variant(("--objective", "slm", "--slm-selection-ratio", str(ratio), *flags), reference)


def _self_reference(score: str) -> Variant:
    return Variant(("--objective", "slm", "--slm-score", score), "compare-raw-rm")


STUDIES = {
    "objectives": Study(OBJECTIVES, "CLM", "curves"),
    "engines": Study(
        {
            "SLM": OBJECTIVES["SLM"],
            "SLM, engine torch": Variant((*SLM, "--slm-cross-entropy", "torch")),
            "SLM, recompute": Variant(RECOMPUTE),
            "SLM, speculative": Variant((*RECOMPUTE, "--slm-exact-mode", "speculative")),
        },
        "SLM",
    ),
    "filtered": Study(
        {"SLM": OBJECTIVES["SLM"], "SLM, filtered": Variant((*SLM, "--slm-backward", "filtered"))}, "SLM"
    ),
    "scopes": Study(SCOPES, "SLM, data-parallel"),
    # figure 9 of the paper
    "ratio": Study(
        {
            "CLM": OBJECTIVES["CLM"],
            **{f"SLM, k {ratio}": _ratio(ratio) for ratio in (0.2, 0.4)},
            "SLM": OBJECTIVES["SLM"],
            "SLM, k 0.8": _ratio(0.8),
            "random, k 0.2": _ratio(0.2, "--slm-score", "random", reference=None),
            "random": OBJECTIVES["random"],
        },
        "CLM",
        "trade-off",
    ),
    "mix": Study(
        {
            "CLM": OBJECTIVES["CLM"],
            "SLM": OBJECTIVES["SLM"],
            **{f"SLM, mix {mix}": Variant((*SLM, "--slm-mix", str(mix))) for mix in (0.1, 0.25, 0.5)},
            "random": OBJECTIVES["random"],
        },
        "CLM",
        "trade-off",
    ),
    # appendix H: 0.7 and 0.7 select about as many tokens as 0.6 alone
    "self-reference": Study(
        {
            "CLM": OBJECTIVES["CLM"],
            "random": OBJECTIVES["random"],
            "reference loss 0.7": _self_reference("reference-loss:0.7"),
            "reference entropy 0.7": _self_reference("reference-entropy:0.7"),
            "intersection": _self_reference("reference-loss:0.7 and reference-entropy:0.7"),
            "union": _self_reference("reference-loss:0.5 or reference-entropy:0.5"),
        },
        "CLM",
        "trade-off",
    ),
    # whole documents instead of tokens; CLM on as many tokens as SLM selects
    "document": Study(
        {
            **OBJECTIVES,
            f"CLM, {SELECTED_STEPS} steps": replace(OBJECTIVES["CLM"], steps=SELECTED_STEPS),
            "documents": replace(OBJECTIVES["CLM"], steps=SELECTED_STEPS, blend=(SELECTED,)),
        },
        "CLM",
        "curves",
    ),
    # section 3.1: text, code and mathematics 6:3:1
    "general": Study(
        {f"{name}, general": replace(variant, blend=GENERAL) for name, variant in OBJECTIVES.items()},
        "CLM, general",
        "curves",
    ),
    # appendix I
    "weak-to-strong": Study(
        {**OBJECTIVES, "SLM, small reference model": Variant(SLM, "compare-small-rm")}, "SLM", "trade-off"
    ),
}
COMPARISON = ("objectives", "engines", "filtered", "scopes")  # the default of compare.py
