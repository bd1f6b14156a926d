"""Settings are mapped to existing fields of Megatron-Core's configurations."""

from __future__ import annotations

from dataclasses import fields

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_slm.config.core_fields import TARGETS, core_fields
from megatron_slm.config.recipe import settings, with_settings
from megatron_slm.config.schema import RunConfig

CORE = dict(zip(TARGETS, (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_every_named_field_exists(target: str) -> None:
    config = RunConfig()
    groups = [getattr(config, group.name) for group in fields(RunConfig)]
    assert set(core_fields(target, *groups)) <= {field.name for field in fields(CORE[target])}


def test_every_target_is_known() -> None:
    named = {target.partition(".")[0] for _, setting, _ in settings() for target in setting.metadata["core"].split()}
    assert named == set(TARGETS)


def test_a_setting_can_have_another_name_and_several_targets() -> None:
    config = with_settings(RunConfig(), {"norm_epsilon": 0.5, "overlap_param_gather": True, "lr": 0.25})
    groups = (config.model, config.parallel, config.optimizer)
    assert core_fields("model", *groups)["layernorm_epsilon"] == 0.5
    assert core_fields("ddp", *groups)["overlap_param_gather"] and core_fields("optimizer", *groups)["lr"] == 0.25
    assert "lr" not in core_fields("model", *groups)
