"""Constraints between settings, one module per topic. Each relation yields a message per violation.

Relations are checked after the constraints of single settings, so they need not guard against zero or missing values.
They may access the file system, but import no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_slm.config.relations import (
    data,
    diagnostics,
    experts,
    files,
    finetuning,
    layout,
    model,
    objective,
    precision,
    schedule,
)
from megatron_slm.config.schema import RunConfig

Relation = Callable[[RunConfig, int], Iterator[str]]
PLAN_RELATIONS: tuple[Relation, ...] = (  # of a run whose data and directories are on another machine
    *layout.RELATIONS,
    *model.RELATIONS,
    *experts.RELATIONS,
    *precision.RELATIONS,
    *schedule.RELATIONS,
    *objective.RELATIONS,
)
RELATIONS: tuple[Relation, ...] = (
    *PLAN_RELATIONS,
    *data.RELATIONS,
    *finetuning.RELATIONS,
    *files.RELATIONS,
    *diagnostics.RELATIONS,
)
INFERENCE_RELATIONS: tuple[Relation, ...] = (
    layout.processes,
    layout.tensor_parallel,
    layout.pipeline_parallel,
    experts.expert_parallel,
)


def relation_violations(config: RunConfig, world_size: int, relations: tuple[Relation, ...] = RELATIONS) -> list[str]:
    """Return the messages of all violated relations."""
    return [message for relation in relations for message in relation(config, world_size)]


def inference_violations(config: RunConfig, world_size: int) -> list[str]:
    """Return the messages of the violated relations between a saved model and a layout for inference."""
    return [message for relation in INFERENCE_RELATIONS for message in relation(config, world_size)]
