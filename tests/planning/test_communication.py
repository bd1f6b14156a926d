"""Messages of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_slm.planning.communication import Messages, step_messages
from megatron_slm.planning.efficiencies import PAPER
from megatron_slm.planning.layout import Layout
from megatron_slm.planning.parameters import rank_parameters
from megatron_slm.planning.step_time import row_layout

HISTOGRAMS = 16384 + 16384 + 8192


def make_layout(scope: str = "data-parallel", objective: str = "slm", micro_batch: int = 1) -> Layout:
    layout = row_layout(PAPER[0])
    config = layout.config
    settings = replace(config.objective, objective=objective, slm_scope=scope)
    training = replace(config.training, micro_batch_size=micro_batch)
    return replace(layout, config=replace(config, objective=settings, training=training))


def threshold_bytes(layout: Layout) -> int:
    return sum(found.bytes * found.count for found in step_messages(layout) if found.purpose == "threshold")


@pytest.mark.parametrize(
    ("scope", "objective", "micro_batch", "rankings"),
    [
        ("data-parallel", "slm", 1, 16),
        ("data-parallel", "slm", 4, 4),
        ("global-batch", "slm", 1, 1),
        ("micro-batch", "slm", 1, 0),  # without context parallelism, each rank ranks its tokens
        ("data-parallel", "clm", 1, 0),
    ],
)
def test_rankings_of_a_step(scope: str, objective: str, micro_batch: int, rankings: int) -> None:
    layout = make_layout(scope, objective, micro_batch)
    assert threshold_bytes(layout) == rankings * (2 * HISTOGRAMS + 8)  # twice for ties


def test_gradients_and_weights_of_the_rank() -> None:
    layout = make_layout()
    sizes = {found.purpose: found.bytes for found in step_messages(layout)}
    count = rank_parameters(layout, 0).total
    assert (sizes["gradients"], sizes["weights"]) == (4 * count, 2 * count)


@pytest.mark.parametrize(
    ("operation", "share"), [("all-reduce", 1.5), ("all-gather", 0.75), ("reduce-scatter", 0.75), ("send", 1.0)]
)
def test_bytes_that_a_rank_sends(operation: str, share: float) -> None:
    assert Messages("test", operation, 4, 2, 1000, 4).sent == 2000 * share
    assert Messages("test", operation, 1, 2, 1000, 1).sent == 0
