"""Curriculum of the selection ratio: a transition from a start value to the final value over steps or tokens."""

from __future__ import annotations

import math

from megatron_slm.config.schema import ObjectiveConfig


def selection_ratio(config: ObjectiveConfig, step: int, tokens: int) -> float:
    """Return the selection ratio k of a step.

    start + (final − start) · f(x), where x is the completed share of the transition; final from its end on.

    Args:
        config: settings of the transition; without a start value, the final ratio is constant.
        step: steps before this one.
        tokens: tokens that the run consumed before this step.
    """
    start, final = config.slm_selection_ratio_start, config.slm_selection_ratio
    if start is None:
        return final
    done, total = step, config.slm_selection_ratio_warmup_iters
    if config.slm_selection_ratio_warmup_tokens:
        done, total = tokens, config.slm_selection_ratio_warmup_tokens
    if done >= total:
        return final
    return start + (final - start) * _shape(config, done, total)


def _shape(config: ObjectiveConfig, done: int, total: int) -> float:
    """Return f(done ÷ total), with f(0) = 0; "steps" has equally long levels before the final one."""
    if config.slm_selection_ratio_style == "steps":
        levels = config.slm_selection_ratio_levels
        return done * levels // total / levels  # of integers: 29 / 100 * 100 is below 29
    share = done / total
    return share if config.slm_selection_ratio_style == "linear" else (1 - math.cos(math.pi * share)) / 2
