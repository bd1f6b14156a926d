"""Compare the gradient of a filtered backward pass with the exact one over a run of the trainer.

    python benchmarks/benchmark_filtered_gradient.py --every 20 --output gradient.json --slm-backward filtered ...

Other flags are those of ``megatron_slm.pretrain``. Before every such step, the gradient of its global batch is computed
with both backward passes from the same weights and selection; the run goes on with the filtered one. One process.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_slm.runtime.files import write_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=20, help="steps between comparisons [%(default)s]")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments, flags = parser.parse_known_args(argv)
    if arguments.every < 1:
        parser.error("--every must be at least 1")
    result = compare(flags, arguments.every)
    if arguments.output is not None:
        write_text(arguments.output, json.dumps({"flags": flags, "steps": result}, indent=1) + "\n", "--output")
    return 0


def compare(flags: list[str], every: int) -> list[dict[str, float]]:
    """Train with ``flags``; return the comparison of every ``every``-th step."""
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.config.checks import resolve
    from megatron_slm.config.flags import parse
    from megatron_slm.data.batches import BatchStream
    from megatron_slm.runtime import process
    from megatron_slm.runtime.console import make_console
    from megatron_slm.runtime.groups import ParallelLayout
    from megatron_slm.tokenizers.tokenizer import build_run_tokenizer
    from megatron_slm.training.curriculum import selection_ratio
    from megatron_slm.training.loop import one_step
    from megatron_slm.training.setup import build_run

    config = resolve(parse([*flags, "--slm-backward", "filtered"]).config, 1)
    groups = process.start(ParallelLayout(), seed=config.training.seed)
    found = []
    try:
        run = build_run(config, build_run_tokenizer(config), groups, make_console(False))
        stream = BatchStream(run.datasets.train, run.shape, device=groups.device)
        print("| step | cosine | norm, filtered ÷ exact |\n| ---: | ---: | ---: |")
        for step in range(config.training.train_iters or 0):
            batches = next(stream)
            ratio = selection_ratio(config.objective, step, run.tokens)
            if step % every == 0:
                found.append({"step": step, "lr": run.state.lr, **gradient_agreement(run, batches, ratio)})
                print(f"| {step} | {found[-1]['cosine']:.4f} | {found[-1]['norm_ratio']:.4f} |", flush=True)
            one_step(run, iter([batches]), lambda results, grad_norm: not results.sums.diverged)
    finally:
        process.stop()
    return found


def gradient_agreement(run: Any, batches: Any, ratio: float) -> dict[str, float]:
    """Return the cosine of the filtered and the exact gradient, and the ratio of their norms."""
    import torch

    from megatron_slm.model.selected_tokens import BackwardFilter
    from megatron_slm.training.step import StepPasses

    class AllTokens(BackwardFilter):
        """Filter nothing: the layers of the run then compute exact gradients."""

        def enter_forward(self, index: int) -> None:
            super().enter_forward(index)
            run.state.backward_filter.current = self.current

        def select(self, index: int, selected: torch.Tensor) -> None:
            super().select(index, torch.ones_like(selected))

    state, gradients = run.state, []
    for backward_filter in (state.backward_filter, AllTokens(state.groups)):
        state.zero_grad()
        passes = StepPasses(state.model_chunks, batches, run.reference(batches), backward_filter)
        state.selection.begin_step(ratio, ratio, passes.ranking_pass)
        passes.run(state.selection)
        state.selection.end_step()
        parameters = [parameter for chunk in state.model_chunks for parameter in chunk.parameters()]
        gradients.append(torch.cat([parameter.main_grad.flatten() for parameter in parameters]).double())
    filtered, exact = gradients
    norms = filtered.norm() / exact.norm()
    return {"cosine": float(filtered @ exact / (filtered.norm() * exact.norm())), "norm_ratio": float(norms)}


if __name__ == "__main__":
    sys.exit(main())
