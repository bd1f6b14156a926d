"""Summaries of a comparison of objectives: tables with the spread over seeds, and speed-up in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_slm.analysis.curves import Curve, mean_and_spread


def comparison_table(curves: Sequence[Curve]) -> str:
    """Return a Markdown table of final held-out losses: mean ± standard deviation over seeds."""
    sets = list(dict.fromkeys(curve.held_out for curve in curves))
    rows = [
        "| objective | " + " | ".join(f"{name} held-out loss" for name in sets) + " |",
        "| --- |" + " ---: |" * len(sets),
    ]
    for objective in dict.fromkeys(curve.objective for curve in curves):
        cells = []
        for held_out in sets:
            _, mean, spread = mean_and_spread(curves, objective, held_out)
            cells.append(f"{mean[-1]:.4f} ± {spread[-1]:.4f}")
        rows.append(f"| {objective} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def paired_differences(curves: Sequence[Curve], baseline: str) -> str:
    """Return sentences with differences of final clean losses to the baseline of the same seed, and its spread."""
    final = {(curve.objective, curve.seed): curve.losses[-1] for curve in curves if curve.held_out == "clean"}
    sentences = []
    for objective in dict.fromkeys(name for name, _ in final if name != baseline):
        differences = [loss - final[baseline, seed] for (name, seed), loss in final.items() if name == objective]
        spread = np.std(differences, ddof=1) if len(differences) > 1 else 0.0
        sentences.append(f"{objective}: {np.mean(differences):+z.4f} ± {spread:.4f}")
    spread = mean_and_spread(curves, baseline, "clean")[2][-1]
    return (
        f"Final clean loss less that of {baseline} with the same seed: {'; '.join(sentences)}. "
        f"Over seeds, {baseline} itself spreads by {spread:.4f}."
    )


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
