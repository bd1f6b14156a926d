"""Test that sequence parallelism is disabled within a block only."""

from types import SimpleNamespace

import torch

from megatron_slm.mcore.sequence import without_sequence_parallelism


def test_attributes_are_restored() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    config = SimpleNamespace(sequence_parallel=True)
    model[0].config = model[1].config = config
    model[0].sequence_parallel = model[1].scatter_to_sequence_parallel = True
    model[1].sequence_parallel = False
    with without_sequence_parallelism([model]):
        inside = (config.sequence_parallel, model[0].sequence_parallel, model[1].scatter_to_sequence_parallel)
    after = (config.sequence_parallel, model[0].sequence_parallel, model[1].scatter_to_sequence_parallel)
    assert inside == (False,) * 3 and after == (True,) * 3 and model[1].sequence_parallel is False
