"""Measure the memory that a filtered backward pass would save if its selection were known before the forward pass.

    python benchmarks/benchmark_known_selection.py --size medium --output known_selection.json

A step of SLM with a filtered backward pass runs once as it is. Then it runs again with its selection given and saves
selected rows only, of more parts of the layers each time. All gradients must be equal. Figures are the peak of tensors
saved for the backward pass, without parameters. One process; weights are not updated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark_training import FILTERED, SIZES, SLM, Bench, quiet

from megatron_slm.runtime.files import write_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="quickstart", help="size of the model and the batch")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args(argv)
    from megatron_slm.runtime import process

    with tempfile.TemporaryDirectory() as directory:
        try:
            result = measure(Bench(arguments.size, Path(directory), 1))
        finally:
            process.stop()
    print(f"size {arguments.size}\n\n| selected rows only | saved values, MiB | less by |\n| --- | ---: | ---: |")
    complete = result["none"]
    for name, size in result.items():
        print(f"| {name} | {size / 2**20:,.1f} | {1 - size / complete:.1%} |")
    if arguments.output is not None:
        write_text(arguments.output, json.dumps(result, indent=1) + "\n", "--output")
    return 0


def measure(bench: Bench) -> dict[str, int]:
    """Return the bytes of saved values by the parts that save selected rows only.

    Raises:
        AssertionError: the gradients differ.
    """
    import torch
    from baselines.known_selection import PARTS, KnownSelection
    from baselines.saved_values import SavedValues

    from megatron_slm.data.batches import BatchStream

    with quiet():
        run = bench.run([*SLM, "--slm-score", "token-loss", *FILTERED])
    batches = next(BatchStream(run.datasets.train, run.shape, device=bench.groups.device))
    (model,) = run.state.model_chunks
    selections: list[torch.Tensor] = []
    select = run.state.backward_filter.select

    def recorded(index: int, selected: torch.Tensor) -> None:
        selections.append(selected.t().clone())
        select(index, selected)

    run.state.backward_filter.select = recorded
    values = SavedValues([model])
    complete = gradient(run, batches, values)
    found, known = {"none": values.peak}, list(selections)
    for count in range(1, len(PARTS) + 1):
        values = KnownSelection(model, known, PARTS[:count])
        torch.testing.assert_close(gradient(run, batches, values), complete)
        found[" + ".join(PARTS[:count])] = values.peak
    return found


def gradient(run: Any, batches: Any, values: Any) -> Any:
    """Return the gradient of a step, whose saved values are counted."""
    import torch

    from megatron_slm.training.step import StepPasses

    state, ratio = run.state, run.config.objective.slm_selection_ratio
    state.zero_grad()
    passes = StepPasses(state.model_chunks, batches, run.reference(batches), state.backward_filter)
    state.selection.begin_step(ratio, ratio, passes.ranking_pass)
    with values:
        passes.run(state.selection)
    state.selection.end_step()
    parameters = [parameter for chunk in state.model_chunks for parameter in chunk.parameters()]
    return torch.cat([parameter.main_grad.flatten() for parameter in parameters])


if __name__ == "__main__":
    sys.exit(main())
