"""Test the settings of overlapped communication."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_slm.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_slm.training.optimizer import data_parallel_config


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(("layers_per_stage", "aligned"), [(None, False), (1, True)])
def test_parameter_gathers_are_aligned_by_the_interleaved_schedule(
    layers_per_stage: int | None, aligned: bool, overlaps: bool
) -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2,
        num_layers_per_virtual_pipeline_stage=layers_per_stage,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps,
        use_distributed_optimizer=True,
    )
    config = replace(RunConfig(), model=ModelConfig(num_layers=4), parallel=parallel)
    assert data_parallel_config(config).align_param_gather == (aligned and overlaps)
