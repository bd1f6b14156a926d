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


def slm_layout(**objective: object) -> Layout:
    """Return a layout of Selective Language Modeling with two corpora."""
    layout = row_layout(PAPER[0])
    config = layout.config
    changed = replace(config.objective, objective="slm", slm_selection_ratio=0.5, **objective)  # type: ignore[arg-type]
    data = replace(config.data, data_path=["web", "math"])
    return replace(layout, config=replace(config, objective=changed, data=data))


@pytest.mark.parametrize(
    ("objective", "share"),
    [
        ({}, 0.5),
        ({"slm_score": "excess:0.2"}, 0.2),
        ({"slm_score": "reference-loss:0.7 and reference-entropy:0.6"}, 0.6),
        ({"slm_score": "excess or random:0.2"}, 0.7),
        ({"slm_score": "excess or token-loss:0.7"}, 1.0),
        ({"slm_corpus_ratios": ["0.8", "math"]}, 0.8),
        ({"slm_corpus_ratios": ["0.2", "math", "0.3", "web"]}, 0.3),
        ({"slm_mix": 0.1}, 1.0),
    ],
)
def test_the_planned_share_is_that_of_tokens_with_a_gradient(objective: dict[str, object], share: float) -> None:
    assert slm_layout(**objective).selected_share == pytest.approx(share)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"slm_scope": "global-batch", "slm_score": "random"}, True),
        ({"slm_scope": "global-batch", "slm_threshold": "predicted"}, True),
        ({"slm_scope": "global-batch", "slm_threshold": "predicted", "slm_score": "random"}, False),
        ({"slm_scope": "global-batch", "slm_threshold": "predicted", "slm_mix": 0.1}, False),
        ({"slm_score": "excess:1"}, True),
        ({"slm_score": "excess:1", "slm_weight_temperature": 1.0}, False),
        ({"slm_corpus_ratios": ["1", "math"]}, False),
        ({}, False),
    ],
)
def test_gradients_of_a_known_selection_are_planned_in_the_forward_pass(
    objective: dict[str, object], expected: bool
) -> None:
    assert slm_layout(**objective).computes_gradient_in_forward == expected
