"""Constraints between settings, one module per topic. Each relation yields a message per violation.

All single settings are within their own constraints, and required ones are given, when relations are examined; so
relations need not guard against zero or a missing value. They may read the file system, but import no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_slm.config.relations import data, experts, files, layout, model, objective, schedule
from megatron_slm.config.schema import Config

Relation = Callable[[Config, int], Iterator[str]]
RELATIONS: tuple[Relation, ...] = (
    *layout.RELATIONS,
    *model.RELATIONS,
    *experts.RELATIONS,
    *schedule.RELATIONS,
    *objective.RELATIONS,
    *data.RELATIONS,
    *files.RELATIONS,
)


def relation_violations(config: Config, world_size: int) -> list[str]:
    """Return the messages of all violated relations."""
    return [message for relation in RELATIONS for message in relation(config, world_size)]
