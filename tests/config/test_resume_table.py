"""Table of settings on resume: every setting has a rule; differences are refused, adopted or reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.checks import derive
from megatron_slm.config.recipe import from_flat_dict, settings, to_flat_dict
from megatron_slm.config.resume import (
    RULES,
    Rule,
    check_weights_fit,
    differences,
    loss_changed,
    reconcile,
    score_changed,
)
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError

RUN = Path("run/iter_0000001")
SAVED = {"num_layers": 4, "num_attention_heads": 4, "seq_length": 32, "position_embedding_type": "rope", "lr": 1e-3}


def config(**changes: Any) -> RunConfig:
    return from_flat_dict({**SAVED, **changes})


def test_every_setting_has_one_rule() -> None:
    assert sorted(RULES) == sorted(setting.name for _, setting, _ in settings())


def test_equal_settings_give_no_line() -> None:
    assert reconcile(config(), config(), RUN, "--load")[1] == ""


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("num_attention_heads", 8, "Give --num-attention-heads 4, or add --use-checkpoint-args"),
        ("rotary_base", 500000, "Give --rotary-base 10000, add --use-checkpoint-args, or start a new run"),
        ("seq_length", 64, "Give --seq-length 32"),
        ("swiglu", True, "--swiglu on differs"),
        ("swiglu", True, "Give --no-swiglu, or add --use-checkpoint-args"),
        ("num_experts", 4, "Leave --num-experts out, or add --use-checkpoint-args"),
        ("activation", "gelu_tanh", "--activation gelu_tanh differs"),
        ("optimizer", "sgd", "add --no-load-optim"),
    ],
)
def test_difference_is_refused_with_a_remedy(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        reconcile(config(**{name: value}), config(), RUN, "--load")
    assert remedy in str(refusal.value) and str(RUN) in str(refusal.value)


def test_all_refusals_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*--seq-length.*--rotary-base"):
        reconcile(config(rotary_base=5, seq_length=64), config(), RUN, "--load")


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("slm_selection_ratio", 0.5, "--slm-selection-ratio 0.6 -> 0.5"),
        ("slm_scope", "sequence", "--slm-scope data-parallel -> sequence"),
        ("reference_load", ["other"], "--reference-load none -> other"),
        ("seed", 7, "--seed 1234 -> 7"),
        ("split", "9,1,0", "--split unset -> 9,1,0"),
        ("adam_beta1", 0.8, "--adam-beta1 0.9 -> 0.8"),
        ("bf16", True, "--bf16 off -> on"),
        ("data_path", ["0.5", "a", "0.5", "b"], "--data-path none -> 0.5 a 0.5 b"),
    ],
)
def test_flag_is_used_and_reported_in_one_line(name: str, value: Any, shown: str) -> None:
    ours = config(**{name: value})
    resumed, line = reconcile(ours, config(), RUN, "--load")
    assert shown in line and "\n" not in line
    assert to_flat_dict(resumed)[name] == value


def test_schedule_and_length_have_no_effect_on_an_evaluation() -> None:
    ours = config(skip_train=True, load_optim=False, lr=0.0, train_iters=1)
    assert reconcile(ours, config(train_iters=8), RUN, "--load") == (ours, "")


def test_settings_without_effect_are_not_compared() -> None:
    ours = config(save="here", log_interval=5, ffn_hidden_size=128, moe_router_topk=1)
    learned = {"position_embedding_type": "learned_absolute"}
    for flags, saved in (
        (ours, config()),
        (config(activation="swiglu"), config(swiglu=True)),
        (config(activation="gelu"), config()),
        (config(**learned, rotary_base=5), config(**learned)),
    ):
        assert reconcile(flags, saved, RUN, "--load") == (flags, "")


def test_checkpoint_settings_are_adopted_if_the_table_or_a_flag_requires_it() -> None:
    saved = config(train_iters=10, init_method_std=0.01)
    ours = config(train_iters=20, lr=5e-3, use_checkpoint_opt_param_scheduler=True)
    ours, line = reconcile(ours, saved, RUN, "--load")
    assert ours.optimizer.lr == 1e-3 and ours.optimizer.lr_decay_iters == 10 and ours.model.init_method_std == 0.01
    assert "--lr 0.005 ignored, 0.001 kept" in line


def test_loss_scale_continues_with_the_optimizer_state() -> None:
    saved, ours = (config(fp16=True, initial_loss_scale=scale) for scale in (1024.0, 8.0))
    line = reconcile(ours, saved, RUN, "--load")[1]
    assert "--initial-loss-scale 8.0 ignored, the current one of the checkpoint kept" in line
    fresh = config(fp16=True, initial_loss_scale=8.0, load_optim=False)
    resumed, line = reconcile(fresh, saved, RUN, "--load")
    assert "--initial-loss-scale 1024.0 -> 8.0" in line and resumed.precision.initial_loss_scale == 8
    for other in (config(bf16=True), config(fp16=True, loss_scale=4.0)):  # without a scale to continue
        resumed, line = reconcile(ours, other, RUN, "--load")
        assert "--initial-loss-scale" not in line and resumed.precision.initial_loss_scale == 8


def test_derived_sizes_are_compared() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    for changes in ({"ffn_hidden_size": 100}, {"kv_channels": 16}):
        with pytest.raises(ConfigError, match=r"--(ffn-hidden-size|kv-channels)"):
            reconcile(derive(config(**sizes, **changes)), derive(config(**sizes)), RUN, "--load")
    ours, saved = derive(config(**sizes)), derive(config(**sizes, ffn_hidden_size=128, kv_channels=8))
    assert reconcile(ours, saved, RUN, "--load") == (ours, "")
    with pytest.raises(ConfigError) as refusal:
        reconcile(derive(config(hidden_size=64)), derive(config(hidden_size=32)), RUN, "--load")
    assert "--ffn-hidden-size" not in str(refusal.value), "only the source of the differences is reported"


def test_weights_must_match_the_architecture() -> None:
    line = check_weights_fit(config(rotary_base=5, seed=3), config(), RUN, "--load")
    assert "--rotary-base 10000 -> 5" in line and "seed" not in line
    with pytest.raises(ConfigError, match="--pretrained-checkpoint: --num-attention-heads 8 differs"):
        check_weights_fit(config(num_attention_heads=8), config(), RUN, "--pretrained-checkpoint")


def test_changed_scores_are_detected() -> None:
    assert score_changed(config(slm_score="token-loss"), config())
    assert not score_changed(config(seed=2), config())


def test_changed_losses_are_detected() -> None:
    for changes in ({"slm_score": "token-loss"}, {"slm_selection_ratio": 0.3}, {"slm_mix": 0.1}):
        assert loss_changed(config(**changes), config())
    assert not loss_changed(config(seed=2), config())


def test_a_moved_reference_model_gives_the_same_scores() -> None:
    moved = config(reference_load=["b"], reference_ckpt_step=5), config(reference_load=["a"])
    assert score_changed(*moved) and not score_changed(*moved, same_reference=True)
    assert score_changed(config(reference_load=["b"], slm_score="token-loss"), moved[1], same_reference=True)


def test_differences_name_the_rule() -> None:
    found = differences(replace(config(), optimizer=config(lr=2e-3).optimizer), config())
    assert [(each.name, each.rule) for each in found] == [("lr", Rule.SCHEDULE)]
