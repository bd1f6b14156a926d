"""Time pipeline-parallel steps with a co-located reference model as a separate pass, and in the pipeline's bubbles.

Megatron-Core's 1F1B schedule runs over gloo with one process per stage. Each forward and backward pass of a stage is a
pause instead of matrix products, so that the figures do not depend on the number of cores. Tensors are small: messages
take no time. Times are medians over steps, which the variants run in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_slm.data.batches import MicroBatch
from megatron_slm.model.pipeline import run_pipeline
from megatron_slm.objective.tokens import ReferenceScores
from megatron_slm.reference.bubble_plan import plan_bubbles
from megatron_slm.reference.bubbles import BubbleReference
from megatron_slm.runtime import process
from megatron_slm.runtime.files import write_text
from megatron_slm.runtime.groups import ParallelLayout
from megatron_slm.testing.ranks import run_ranks

BACKWARD = 2.0  # duration of a backward pass, in forward passes
VARIANTS = ("no reference model", "separate pass", "in bubbles")


class Pauses(torch.autograd.Function):
    """Add one to the input; the forward and the backward pass take given times."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return values + 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(BACKWARD * ctx.seconds)
        return gradients[0], None


class Stage(torch.nn.Module):
    """Represent a stage of a model whose passes take given times."""

    def __init__(self, config: TransformerConfig, seconds: float) -> None:
        super().__init__()
        self.config, self.seconds, self.model_type = config, seconds, ModelType.encoder_or_decoder
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.received: Tensor | None = None

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        self.received = received[0]

    def forward(self, tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        inputs = tokens.t()[..., None].float() + self.weight if self.received is None else self.received
        result = Pauses.apply(inputs, self.seconds)
        assert isinstance(result, Tensor)
        return result


class Replica:
    """Implement the reference model."""

    def __init__(self, stage: Stage) -> None:
        self.chunks = [stage]

    def token_scores(self, batch: MicroBatch, output: Any) -> ReferenceScores:
        return ReferenceScores(output[..., 0].t())

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[ReferenceScores]:
        def last_stage(_: int, batch: MicroBatch, output: Any) -> tuple[Tensor, Tensor, ReferenceScores]:
            return output.sum(), torch.tensor(1), self.token_scores(batch, output)

        with torch.no_grad():
            return run_pipeline(self.chunks, micro_batches, last_stage, forward_only=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--stages", type=int, default=4, help="pipeline-parallel size")
    add("--micro-batches", type=int, nargs="+", default=[4, 8, 16])
    add("--reference", type=float, nargs="+", default=[1.0], help="forward time of the reference model, relative")
    add("--actual", type=float, help="true relative time, if it differs from the plan's")
    add("--forward-ms", type=float, default=40, help="time of the training model's forward pass in a stage")
    add("--steps", type=int, default=9)
    add("--output", type=Path, help="JSON file")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    rows = []
    for reference in arguments.reference:
        for micro_batches in arguments.micro_batches:
            actual = reference if arguments.actual is None else arguments.actual
            settings = (micro_batches, arguments.forward_ms / 1e3, reference, actual, arguments.steps)
            row = run_ranks(measure, arguments.stages, *settings, initialize=False, timeout=3600)[0]
            rows.append(row)
            print(
                f"PP {arguments.stages}, {micro_batches:>3} micro-batches, reference {reference:g}: "
                + ", ".join(f"{name} {row['milliseconds'][name]:.0f} ms" for name in VARIANTS)
                + f"; overhead {row['overhead']['separate pass']:.0f} and {row['overhead']['in bubbles']:.0f} ms, "
                f"{1 - row['overhead']['in bubbles'] / row['overhead']['separate pass']:.0%} lower",
                flush=True,
            )
    if arguments.output is not None:
        report = {"stages": arguments.stages, "forward_ms": arguments.forward_ms, "rows": rows}
        write_text(arguments.output, json.dumps(report, indent=2) + "\n", "--output")
    return 0


def measure(
    rank: int, stages: int, micro_batches: int, seconds: float, reference: float, actual: float, steps: int
) -> dict[str, Any]:
    """Return the step times of all variants, and the reference scores' equality."""
    groups = process.start(ParallelLayout(pipeline=stages), seed=1)
    config = TransformerConfig(
        num_layers=stages,
        hidden_size=1,
        num_attention_heads=1,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
    )
    config.finalize_model_grads_func = lambda *_, **__: None
    model, replica = Stage(config, seconds), Replica(Stage(config, seconds * actual))
    plan = plan_bubbles(stages, micro_batches, reference=reference, backward=BACKWARD)
    source = BubbleReference(replica, plan, model, groups)  # type: ignore[arg-type]
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(2):  # rounds
        for name in VARIANTS:
            times[name] += _steps(name, model, source, micro_batches, -(-steps // 2))
    process.stop()
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    overhead = {name: medians[name] - medians["no reference model"] for name in VARIANTS[1:]}
    return {
        "micro_batches": micro_batches,
        "reference": reference,
        "actual_reference": actual,
        "plan": plan,
        "milliseconds": medians,
        "overhead": overhead,
        "seconds": times,
    }


def _steps(name: str, model: Stage, source: BubbleReference, micro_batches: int, steps: int) -> list[float]:
    """Return the times of ``steps`` steps; the steps before and after them differ, since nothing is read beyond."""
    times, upcoming = [], _batches(0, micro_batches)
    for step in range(steps + 2):
        current, upcoming = upcoming, _batches(step + 1, micro_batches)
        source.upcoming = upcoming if name == "in bubbles" and step < steps + 1 else None
        dist.barrier()
        began = time.perf_counter()
        scores = [] if name == "no reference model" else source.score(current)
        run_pipeline([model], current, _loss, forward_only=False)
        dist.barrier()
        times.append(time.perf_counter() - began)
        for batch, score in zip(current, scores, strict=bool(scores)):
            assert torch.equal(score.loss, batch.tokens + source.groups.pp_size), "scores of another micro-batch"
    return times[1:-1]


def _loss(_: int, batch: MicroBatch, output: Any) -> tuple[Tensor, Tensor, None]:
    return output.sum(), torch.tensor(1), None


def _batches(step: int, count: int) -> list[MicroBatch]:
    values = [torch.full((1, 2), 100 * step + index) for index in range(count)]
    mask = torch.ones(1, 2, dtype=torch.bool)
    return [MicroBatch(value, value, mask, value, value[:, 0], 0) for value in values]


if __name__ == "__main__":
    sys.exit(main())
