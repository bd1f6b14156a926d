"""Step times: the published throughputs, and comparisons with measurements that the planner does not use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_slm.planning.devices import DEVICES
from megatron_slm.planning.efficiencies import MEASUREMENTS, PAPER, Measurement
from megatron_slm.planning.layout import Layout
from megatron_slm.planning.step_time import derive_efficiency, find_efficiency, row_layout, step_time
from megatron_slm.runtime.errors import ConfigError


def tokens_per_second(layout: Layout) -> float:
    """Return the planned throughput per device."""
    seconds = step_time(layout, find_efficiency(layout).value).total
    return layout.step_tokens / seconds / layout.world_size


@pytest.mark.parametrize("row", MEASUREMENTS, ids=lambda row: row.name)
def test_a_published_layout_has_the_published_throughput(row: Measurement) -> None:
    assert tokens_per_second(row_layout(row)) == pytest.approx(row.tokens_per_second, rel=1e-3)
    assert 0.1 < derive_efficiency(row) < 0.75


@pytest.mark.parametrize("row", PAPER, ids=lambda row: row.name)
def test_the_paper_s_throughput_is_planned_within_15_percent(row: Measurement) -> None:
    layout = row_layout(row)
    config = layout.config
    objective = replace(config.objective, objective="slm")
    reference = replace(config.reference, reference_load=["reference"])
    layout = replace(layout, config=replace(config, objective=objective, reference=reference))
    assert tokens_per_second(layout) == pytest.approx(row.tokens_per_second, rel=0.15)


def test_an_unmeasured_device_and_precision_is_refused() -> None:
    layout = row_layout(MEASUREMENTS[0])
    training = replace(layout.config.training, bf16=False)
    with pytest.raises(ConfigError, match="no published throughputs"):
        find_efficiency(replace(layout, config=replace(layout.config, training=training)))


def test_models_outside_the_table_are_reported() -> None:
    layout = row_layout(PAPER[0])
    assert "smaller than all measured ones" in find_efficiency(layout).note
    assert "as h100" in find_efficiency(replace(layout, device=DEVICES["h200"])).note


def test_passes_of_selective_language_modeling_extend_the_step() -> None:
    layout = row_layout(PAPER[0])
    config = layout.config
    reference = replace(config.reference, reference_load=["reference"])

    def seconds(**objective: object) -> float:
        changed = replace(config.objective, objective="slm", **objective)  # type: ignore[arg-type]
        return step_time(replace(layout, config=replace(config, objective=changed, reference=reference)), 0.4).total

    clm = step_time(layout, 0.4).total
    assert clm < seconds(slm_backward="filtered") < seconds() < seconds(slm_scope="global-batch")
