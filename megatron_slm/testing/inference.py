"""Models for inference in tests, opened on the ranks of one job."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from megatron_slm.config.schema import ParallelConfig
from megatron_slm.inference.model import InferenceModel, open_model
from megatron_slm.runtime import process
from megatron_slm.runtime.groups import ParallelLayout


@contextlib.contextmanager
def opened(
    checkpoint: str,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    *,
    sequence_parallel: bool = False,
    virtual_stages: bool = False,
    **tokenizer: Any,
) -> Iterator[InferenceModel]:
    """Open a checkpoint on the ranks of this job; remaining ranks are data-parallel.

    Args:
        sequence_parallel: as some training runs.
        virtual_stages: build one chunk per layer, as training runs with the interleaved schedule.
        tokenizer: tokenizer settings, for checkpoints without a tokenizer.
    """
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        sequence_parallel=sequence_parallel,
        num_layers_per_virtual_pipeline_stage=1 if virtual_stages else None,
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            virtual = 2 if virtual_stages else None  # of models with four layers on two stages
            groups = process.start(ParallelLayout(tp, pp, expert=ep, virtual_pipeline=virtual))
            yield open_model(checkpoint, parallel, groups, tokenizer_settings=tokenizer)
    finally:
        process.stop()
