"""Process groups of a run as an explicit value, which replaces Megatron-Core's global parallel state elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel dimensions; the remaining ranks are data-parallel."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    virtual_pipeline: int | None = None  # model chunks per pipeline rank, or None


@dataclass(frozen=True)
class Groups:
    """Process groups and device of this rank."""

    tp: ProcessGroup
    pp: ProcessGroup
    dp: ProcessGroup
    cp: ProcessGroup  # context-parallel ranks, which hold different chunks of the same samples
    dp_cp: ProcessGroup  # data- and context-parallel ranks, which hold different tokens
    model: ProcessGroup  # tensor- and pipeline-parallel ranks, which hold the same tokens
    device: torch.device
    rank: int
    world_size: int

    @property
    def tp_size(self) -> int:
        return self.tp.size()

    @property
    def tp_rank(self) -> int:
        return self.tp.rank()

    @property
    def pp_size(self) -> int:
        return self.pp.size()

    @property
    def pp_rank(self) -> int:
        return self.pp.rank()

    @property
    def dp_size(self) -> int:
        return self.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.dp.rank()

    @property
    def cp_size(self) -> int:
        return self.cp.size()

    @property
    def cp_rank(self) -> int:
        return self.cp.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_logging_rank(self) -> bool:
        return self.rank == 0


def pipeline_group(groups: Groups, backend: str | None = None) -> ProcessGroup:
    """Return another group of the ranks of this rank's pipeline. Collective over all ranks.

    Args:
        backend: None for the default.
    """
    ranks = dist.get_process_group_ranks(groups.pp)
    pipelines: list[list[int]] = [[] for _ in range(groups.world_size)]
    dist.all_gather_object(pipelines, ranks)
    unique = [list(pipeline) for pipeline in sorted({tuple(pipeline) for pipeline in pipelines})]
    group, _ = dist.new_subgroups_by_enumeration(unique, backend=backend)
    return group
