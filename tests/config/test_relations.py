"""Constraints of single settings and relations, empty values, and one message for all problems."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_checks import run_check

from megatron_slm.config.constraints import Bounds, flag_name
from megatron_slm.config.flags import Parser, parse, parse_strictly
from megatron_slm.config.recipe import settings
from megatron_slm.runtime.errors import ConfigError

FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}
INTERLEAVED = {"num_layers_per_virtual_pipeline_stage": 1}
WARMUP_FLUSH = "overlap_p2p_communication_warmup_flush"


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (1, {**FULL, "recompute_num_layers": 0}, "--recompute-num-layers is 0, and must be above 0"),
        (
            1,
            {**FULL, "recompute_num_layers": 3},
            "--recompute-num-layers 3 does not divide layers per pipeline stage, 4",
        ),
        (1, {"recompute_num_layers": 1}, "--recompute-num-layers has no effect without --recompute-granularity full"),
        (1, {"lr_warmup_fraction": 1}, "--lr-warmup-fraction is 1.0, and must be in [0, 1)"),
        (1, {"adam_beta1": 1}, "--adam-beta1 is 1.0, and must be in [0, 1)"),
        (1, {"adam_beta2": 1}, "--adam-beta2 is 1.0, and must be in [0, 1)"),
        (1, {"sgd_momentum": -1}, "--sgd-momentum is -1.0"),
        (1, {"seed": 2**64}, "--seed is 18446744073709551616, and must be in [0, 4294967295]"),
        (1, {"seed": 2**32}, "--seed is 4294967296"),
        (1, {"start_weight_decay": 0.1, "end_weight_decay": 0.05}, "--end-weight-decay 0.05 is below --start-weight"),
        (1, {"start_weight_decay": 0.1, "end_weight_decay": 0.2}, "--weight-decay-incr-style is constant"),
        (1, {"weight_decay_incr_style": "linear"}, "needs --start-weight-decay and --end-weight-decay"),
        (1, {"num_experts": 2, "moe_router_topk": 1}, "--moe-router-topk 1 needs --moe-router-pre-softmax"),
        (2, {"tensor_model_parallel_size": 2, "ffn_hidden_size": 33}, "does not divide --ffn-hidden-size 33"),
        (
            1,
            {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
            "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler were both given",
        ),
        (1, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 11}, "--lr-wsd-decay-iters 11 is more than the 10 steps"),
        (1, {"lr_wsd_decay_iters": 1}, "--lr-wsd-decay-iters has no effect without --lr-decay-style WSD"),
        (1, {"lr_decay_iters": 0}, "--lr-decay-iters is 0, and must be above 0"),
        (1, {"position_embedding_type": "rope", "rotary_percent": 0.1}, "rotates pairs of channels"),
        (1, {"position_embedding_type": "rope", "kv_channels": 3}, "of 3 channels per head is 3"),
        (1, {"ckpt_step": -1}, "--ckpt-step is -1, and must be 0 or more"),
        (1, {"wandb_exp_name": "name"}, "--wandb-exp-name name has no effect without --wandb-project"),
        (
            1,
            {"profile": True, "profile_step_start": 12},
            "--profile-step-end 12 must be above --profile-step-start 12.",
        ),
        (1, {"profile_step_end": 5}, "--profile-step-end has no effect without --profile."),
        (1, {"use_pytorch_profiler": True}, "--use-pytorch-profiler has no effect without --profile."),
        (1, {"pytorch_profiler_collect_shapes": True}, "has no effect without --use-pytorch-profiler."),
        (1, {"profile_ranks": [0]}, "--profile-ranks has no effect without --profile or --record-memory-history."),
        (1, {"memory_snapshot_path": "a"}, "--memory-snapshot-path has no effect without --record-memory-history."),
        (2, {"profile": True, "profile_ranks": [0, 2, -1]}, "--profile-ranks 2 -1: the run has the ranks 0 to 1."),
        (
            1,
            {"manual_gc_interval": 5, "no_manual_gc_eval": True},
            "--manual-gc-interval --no-manual-gc-eval has no effect",
        ),
        (
            1,
            {"optimizer": "muon"},
            "emerging-optimizers, whose only release on the package index, 0.3.0, needs Python 3.12",
        ),
        (
            1,
            {"optimizer": "dist_muon"},
            "--optimizer dist_muon is not supported: Megatron-Core has it from version 0.16",
        ),
        (1, {"wandb_save_dir": "logs"}, "--wandb-save-dir logs has no effect without --wandb-project"),
        (1, {"objective": "slm", "reference_scores": ":"}, "--reference-scores :: a name has a letter"),
        (1, {"objective": "slm", "reference_scores": "out/.."}, "--reference-scores out/..: a name has a letter"),
        (1, {"slm_loss_mask": "best"}, "--slm-loss-mask best has no effect without --objective sft"),
        (1, {"objective": "sft", "slm_loss_mask": "a/b"}, "--slm-loss-mask a/b must consist of letters, digits"),
        (1, {"objective": "sft", "slm_mix": 0.1}, "--slm-mix has no effect with --objective sft and every answer"),
        (1, {"objective": "sft", "mtp_num_layers": 1}, "--mtp-num-layers is not supported with --objective sft"),
        (1, {"objective": "sft", "slm_sentences": "join"}, "--slm-sentences join has no effect with --objective sft"),
        (1, {"objective": "sft", "mock_data": True}, "mock data have no answers"),
        (
            2,
            {"objective": "sft", "transformer_impl": "transformer_engine", "context_parallel_size": 2},
            "which does not work with --context-parallel-size above 1. Use --transformer-impl local",
        ),
        (1, {"ckpt_step": 5}, "--ckpt-step 5 has no effect without --load"),
        (1, {"reference_in_bubbles": True}, "--reference-in-bubbles has no effect without --reference-load"),
        (1, {"reference_in_bubbles": True}, "--reference-in-bubbles needs --pipeline-model-parallel-size above 1"),
        (
            2,
            {"reference_in_bubbles": True, "pipeline_model_parallel_size": 2, "global_batch_size": 2},
            "micro-batches per step as pipeline stages, 2, and --global-batch-size 2 has 1",
        ),
        (
            2,
            {
                "reference_in_bubbles": True,
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 1,
            },
            "--reference-in-bubbles and --num-layers-per-virtual-pipeline-stage were both given",
        ),
        (
            2,
            {"no_overlap_p2p_communication": True, "pipeline_model_parallel_size": 2, **INTERLEAVED},
            "--no-overlap-p2p-communication needs --pipeline-model-parallel-size above 2 with --num-layers-per-virtual",
        ),
        (2, {"pipeline_model_parallel_size": 2, WARMUP_FLUSH: True}, "flush needs --num-layers-per-virtual"),
        (
            4,
            {
                "pipeline_model_parallel_size": 4,
                **INTERLEAVED,
                WARMUP_FLUSH: True,
                "no_overlap_p2p_communication": True,
            },
            "--overlap-p2p-communication-warmup-flush contradicts --no-overlap-p2p-communication",
        ),
        (1, {"reference_ckpt_step": 5}, "--reference-ckpt-step 5 has no effect without --reference-load"),
        (1, {"save_retain_interval": 3}, "--save-retain-interval 3 needs --save-interval"),
        (1, {"exit_duration_in_mins": 0}, "--exit-duration-in-mins is 0, and must be above 0"),
        (1, {"train_iters": 2**31}, "--train-iters is 2147483648, and must be at most 2147483647"),
        (1, {"rampup_batch_size": [1, 1, 10**20]}, "--rampup-batch-size is 100000000000000000000, and must be at most"),
        (1, {"iterations_to_skip": [2**31]}, "--iterations-to-skip is 2147483648, and must be at most"),
        (1, {"slm_hang_timeout": 0.001}, "--slm-hang-timeout is 0.001, and must be 0"),
        (
            1,
            {"profile": True, "use_pytorch_profiler": True, "train_iters": 10},
            "--profile-step-start 10 is not below --train-iters 10: no step would be profiled",
        ),
        (1, {"attention_dropout": 1}, "--attention-dropout is 1.0, and must be in [0, 1)"),
        (1, {"lr": "-1e-3"}, "--lr is -0.001"),  # argparse would take these for flags
        (1, {"lr": "-inf"}, "--lr is -inf"),
        (1, {"split": "-1,2,3"}, "--split -1,2,3 must be up to three proportions"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_setting_is_refused(world_size: int, changes: dict[str, Any], message: str) -> None:
    renamed = {name.replace("opt_param", "opt-param"): value for name, value in changes.items()}
    with pytest.raises(ConfigError) as error:
        run_check(world_size, **renamed)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "flag", ["--save", "--load", "--data-path", "--lr", "--config", "--tokenizer-model", "--split"]
)
@pytest.mark.parametrize("value", ["", " ", "\t"])
def test_empty_text_is_refused(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is empty"):
        parse([f"{flag}={value}"])


TEXT_SETTINGS = [flag_name(setting) for _, setting, kind in settings() if kind is not bool]


@pytest.mark.parametrize("flag", TEXT_SETTINGS)
def test_empty_value_of_every_flag_is_refused(flag: str) -> None:
    for arguments in ([flag, ""], [flag, " "], [f"{flag}="]):
        with pytest.raises(ConfigError, match=f"{flag}(: the set valid)? is empty"):
            parse(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data-path", "", "a"],
        ["--data-path", "1", "a", "2", ""],
        ["--train-data-path", "1", ""],
        ["--reference-scores", "a", ""],
        ["--valid-data-path", "clean=a", ""],
    ],
    ids=str,
)
def test_empty_prefix_of_a_blend_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{arguments[0]} is empty"):
        parse(arguments)


@pytest.mark.parametrize("arguments", [["--input", ""], ["--input", "a", ""], ["--input", "a", "--output", " "]])
def test_empty_value_of_a_tool_is_refused(arguments: list[str]) -> None:
    parser = Parser()
    parser.add_argument("--input", nargs="+")
    parser.add_argument("--output", default="")
    assert parse_strictly(parser, ["--input", "a"], {}).output == ""
    with pytest.raises(ConfigError, match=r"--\w+ is empty"):
        parse_strictly(parser, arguments, {})


@pytest.mark.parametrize("argument", ["clean=", "=path", "clean= path", "clean=a raw="])
def test_validation_set_without_a_name_or_prefix_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"lacks a (prefix|name)"):
        parse(["--valid-data-path", *argument.split()])


def test_blank_prefix_of_a_validation_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks a prefix"):
        parse(["--valid-data-path", "clean=  "])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("save:\n", "save is empty"),
        ("save: ''\n", "save is empty"),
        ("train_iters:\n", "train_iters is empty"),
        ("data_path: [a, '']\n", "data_path is empty"),
        ("data_path:\n  a: 1\n  b:\n", "data_path.b is empty"),
        ("valid_data_path: {clean: }\n", "valid_data_path.clean is empty"),
        ("valid_data_path: {clean: []}\n", "valid_data_path.clean is empty"),
        ("lr: 1\nlr: 2\n", "lr is given twice"),
        ("num-layers: 1\nnum_layers: 2\n", "num_layers is given twice"),
        ("save_optim: true\nno_save_optim: true\n", "save_optim is given twice"),
        ("data_path: true\n", "data_path must be a list of prefixes or weights and prefixes, not True"),
        ("data_path: [null, a]\n", "data_path must be a list of prefixes"),
        ("lr: 2020-13-45\n", "not valid YAML"),
        ("? [a]\n: 1\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ('save: "\\0"\n', "not valid UTF-8"),
    ],
)
def test_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse(["--config", str(recipe)])
    assert message in str(error.value) and str(recipe) in str(error.value)


@pytest.mark.parametrize("content", [b"lr: \xff", b"\x00\x01", b"\x80PNG"])
def test_recipe_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    with pytest.raises(ConfigError, match=r"the recipe is not (UTF-8 text|valid YAML)"):
        parse(["--config", str(recipe)])
    with pytest.raises(ConfigError, match="the recipe cannot be read: Is a directory"):
        parse(["--config", str(tmp_path)])


def test_null_in_a_recipe_is_the_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("save: null\ntrain_iters: ~\n")
    assert parse(["--config", str(recipe)]).config.checkpoint.save is None


def test_all_problems_are_in_one_message() -> None:
    with pytest.raises(ConfigError) as error:
        parse(["--lr", "x", "--num-layers", "0", "--fp16-lm-cross-entropy", "--nonsense", "--save="])
    assert str(error.value).startswith("5 problems:")
    with pytest.raises(ConfigError) as error:
        run_check(1, min_lr=1, finetune=True)
    for message in ("--min-lr 1.0 is above --lr 0.001", "--finetune needs --load"):
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(above=0), "above 0"),
        (Bounds(at_least=2), "2 or more"),
        (Bounds(at_most=2), "at most 2"),
        (Bounds(below=2.5), "below 2.5"),
        (Bounds(above=0, at_most=1), "in (0, 1]"),
        (Bounds(at_least=0, below=1), "in [0, 1)"),
        (Bounds(at_least=0, at_most=2**32), "in [0, 4294967296]"),
        (Bounds(), "finite"),
    ],
)
def test_bounds_are_described(bounds: Bounds, text: str) -> None:
    assert bounds.describe() == text
    assert not bounds.contain(float("nan")) and not bounds.contain(float("inf"))


BAD_VALUES = [
    ["--lr", "x"],
    ["--seed", str(2**64)],
    ["--no-such-flag"],
    ["--ckpt-format", "torch"],
    ["--slm-score", "exess"],
    ["--min-lr", "2"],
]


def test_values_are_validated_before_torch_is_imported() -> None:
    good = "--num-layers 2 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --micro-batch-size 1 --train-iters 1"
    good += " --lr 1 --tokenizer-type ByteTokenizer --data-path x"
    code = f"""
import sys
from megatron_slm.cli.pretrain import main
for arguments in {BAD_VALUES!r}:
    assert main([*{good.split()!r}, *arguments]) == 2, arguments
    assert not {{"torch", "megatron.core"}} & set(sys.modules), arguments
"""
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - began < 10  # 0.6 s on an idle machine
