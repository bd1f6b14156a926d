"""Whether a run selects tokens, and the settings that --objective sft implies."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.schema import ObjectiveConfig, RunConfig

ANSWERS = "answers"  # loss mask of tools/preprocess_sft.py


def mask_name_problem(name: str) -> str | None:
    """Return the error for a text that is no name of a loss mask, if it is none."""
    if name.replace("-", "").replace("_", "").isalnum() and name.isascii():
        return None
    return f"--slm-loss-mask {name} must consist of letters, digits, - and _."


def selects_tokens(config: RunConfig) -> bool:
    """Return whether the run selects tokens: with --objective sft, only if a reference or a score is given."""
    objective, reference = config.objective, config.reference
    if objective.objective == "sft":
        has_reference = reference.is_co_located or bool(reference.reference_scores)
        return has_reference or objective.slm_score != ObjectiveConfig().slm_score
    return objective.objective == "slm"


def finetuning_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that --objective sft implies: isolated examples with a loss mask."""
    if config.objective.objective != "sft":
        return {}
    return {
        "reset_position_ids": True,
        "reset_attention_mask": True,
        "slm_loss_mask": config.data.slm_loss_mask or ANSWERS,
    }
