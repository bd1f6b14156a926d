"""Summaries of a comparison of variants: tables with the spread over seeds, and speed-up in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_slm.analysis.curves import Curve, final_losses, mean_and_spread


def comparison_table(curves: Sequence[Curve], baseline: str) -> str:
    """Return a Markdown table of final held-out losses, and of differences to the baseline with the same seed.

    Args:
        curves: of all variants, with the same seeds.
        baseline: variant that the others are compared with.

    Returns:
        One row per variant: for each held-out set, mean ± standard deviation over seeds of the loss and of the
        difference; of one seed the values.
    """
    sets = list(dict.fromkeys(curve.held_out for curve in curves))
    rows = [
        "| variant | " + " | ".join(f"{name} held-out loss | less {baseline}'s" for name in sets) + " |",
        "| --- |" + " ---: | ---: |" * len(sets),
    ]
    for variant in dict.fromkeys(curve.variant for curve in curves):
        cells = []
        for held_out in sets:
            losses, own = final_losses(curves, held_out, baseline), final_losses(curves, held_out, variant)
            cells.append(_with_spread(own, ""))
            cells.append("" if variant == baseline else _with_spread(own - losses, "+z"))
        rows.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _with_spread(values: NDArray[np.float64], sign: str) -> str:
    spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""  # one seed has none
    return f"{values.mean():{sign}.4f}{spread}"


def tokens_to_reach(tokens: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Return the tokens at which a linearly interpolated loss curve first reaches ``target``."""
    for index, loss in enumerate(losses):
        if loss <= target:
            if index == 0:
                return tokens[0]
            share = (losses[index - 1] - target) / (losses[index - 1] - loss)
            return tokens[index - 1] + share * (tokens[index] - tokens[index - 1])
    return math.inf


def speedup(curves: Sequence[Curve], faster: str, baseline: str) -> str:
    """Return sentences on the tokens to the baseline's final clean loss, and on the difference in raw loss."""
    tokens, slow, _ = mean_and_spread(curves, baseline, "clean")
    _, fast, _ = mean_and_spread(curves, faster, "clean")
    reached = tokens_to_reach(tokens.tolist(), fast.tolist(), float(slow[-1]))
    if math.isinf(reached):
        first = f"{faster} does not reach {baseline}'s final clean loss ({slow[-1]:.4f})."
    else:
        first = (
            f"{faster} reaches {baseline}'s final clean loss ({slow[-1]:.4f}) after {reached:,.0f} of "
            f"{tokens[-1]:,.0f} tokens ({reached / tokens[-1]:.0%})."
        )
    _, raw_fast, _ = mean_and_spread(curves, faster, "raw")
    _, raw_slow, _ = mean_and_spread(curves, baseline, "raw")
    gap = raw_fast - raw_slow
    worst = int(np.argmax(gap))
    second = (
        f"Its raw held-out loss ends {gap[-1]:+.4f} nats from {baseline}'s; the gap is largest at "
        f"{tokens[worst]:,.0f} tokens ({gap[worst]:+.4f})."
    )
    rises = [int(tokens[i]) for i in range(1, len(tokens)) if raw_fast[i] > raw_fast[i - 1]]
    third = f"Its raw loss rises at {', '.join(f'{t:,}' for t in rises)} tokens." if rises else "It never rises."
    return f"{first} {second} {third}"
