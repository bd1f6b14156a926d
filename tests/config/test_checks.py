"""Validation of configurations for any number of processes, without starting any."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.checks import resolve
from megatron_slm.config.flags import parse
from megatron_slm.runtime.errors import ConfigError

GOOD: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "micro_batch_size": 2,
    "train_iters": 10,
    "lr": 1e-3,
    "tokenizer_type": "ByteTokenizer",
    "data_path": "corpus",
}


def run_check(world_size: int, **changes: Any) -> Any:
    arguments: list[str] = []
    for name, value in {**GOOD, **changes}.items():
        if value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return resolve(parse(arguments).config, world_size)


def test_derived_settings() -> None:
    config = run_check(4, tensor_model_parallel_size=2)
    assert config.training.global_batch_size == 4 and config.model.max_position_embeddings == 32


def test_a_run_in_samples_has_only_complete_batches() -> None:
    assert run_check(1, train_iters=None, train_samples=100, global_batch_size=16).training.train_iters == 6


FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"


@pytest.mark.parametrize(
    ("stages", "layers", "sizes"),
    [(2, 4, {FIRST: 1}), (2, 5, {FIRST: 2, LAST: 3}), (3, 7, {LAST: 1}), (4, 8, {FIRST: 1, LAST: 3})],
)
def test_uneven_pipelines(stages: int, layers: int, sizes: dict[str, int]) -> None:
    run_check(stages, pipeline_model_parallel_size=stages, num_layers=layers, **sizes)


@pytest.mark.parametrize(
    ("stages", "layers", "more", "message"),
    [
        (1, 4, {FIRST: 1}, "--decoder-first-pipeline-num-layers 1 needs --pipeline-model-parallel-size above 1"),
        (2, 4, {FIRST: 0}, "--decoder-first-pipeline-num-layers is 0"),
        (2, 4, {FIRST: 4}, "leaves 0 of --num-layers 4 for 1 other pipeline stages"),
        (2, 4, {LAST: 5}, "leaves -1 of --num-layers 4"),
        (2, 5, {FIRST: 2, LAST: 2}, "leaves 1 of --num-layers 5 for 0 other pipeline stages"),
        (2, 5, {FIRST: 3, LAST: 3}, "leaves -1 of --num-layers 5"),
        (3, 8, {FIRST: 1}, "leaves 7 of --num-layers 8 for 2 other pipeline stages"),
        (4, 5, {FIRST: 2, LAST: 2}, "leaves 1 of --num-layers 5 for 2 other pipeline stages"),
        (
            *(2, 8),
            {FIRST: 2, "num_layers_per_virtual_pipeline_stage": 2, "micro_batch_size": 1, "global_batch_size": 2},
            "cannot be combined with --num-layers-per-virtual-pipeline-stage",
        ),
    ],
)
def test_invalid_uneven_pipelines(stages: int, layers: int, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_check(stages, pipeline_model_parallel_size=stages, num_layers=layers, **more)


@pytest.mark.parametrize("name", [name for name in GOOD if name != "data_path"])
def test_missing_required_settings_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        run_check(1, **{name: None})


def test_missing_model_settings_name_the_checkpoint_that_has_them(tmp_path: Path) -> None:
    absent, adopt = str(tmp_path / "absent"), "Add --use-checkpoint-args to take those of the model from"
    for changes, remedy in (
        ({"load": str(tmp_path)}, f"{adopt} --load {tmp_path}"),
        ({"load": absent}, f"--load {absent}, which could provide them, is not a directory"),
        ({"load": absent, "save": absent, "pretrained_checkpoint": str(tmp_path)}, f"{adopt} --pretrained-checkpoint"),
        ({"load": absent, "save": absent}, "$"),
        ({}, "$"),
    ):
        with pytest.raises(ConfigError, match=rf"^missing required settings: --num-layers(\. )?{remedy}"):
            run_check(1, num_layers=None, **changes)


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (3, {"tensor_model_parallel_size": 2}, "3 processes were started, which is not a multiple"),
        (
            8,
            {"tensor_model_parallel_size": 8},
            "--tensor-model-parallel-size 8 does not divide --num-attention-heads 4",
        ),
        (3, {"pipeline_model_parallel_size": 3}, "--pipeline-model-parallel-size 3 does not divide --num-layers 4"),
        (
            3,
            {
                "tensor_model_parallel_size": 3,
                "num_attention_heads": 6,
                "group_query_attention": True,
                "num_query_groups": 2,
            },
            "--tensor-model-parallel-size 3 is neither a divisor nor a multiple of --num-query-groups 2",
        ),
        (1, {"group_query_attention": True}, "--group-query-attention needs --num-query-groups"),
        (1, {"num_query_groups": 2}, "--num-query-groups has no effect without"),
        (
            2,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 33},
            "does not divide --seq-len",
        ),
        (1, {"moe_aux_loss_coeff": 0.1}, "--moe-aux-loss-coeff has no effect without --num-experts"),
        (1, {"num_experts": 2, "moe_router_topk": 3}, "--moe-router-topk 3 is more than --num-experts 2"),
        (2, {"num_experts": 3, "expert_model_parallel_size": 2}, "does not divide --num-experts 3"),
        (1, {"num_experts": 2, "expert_model_parallel_size": 2}, "does not divide ranks that hold the same layers"),
        (2, {"num_experts": 2, "tensor_model_parallel_size": 2}, "needs --sequence-parallel"),
        (
            1,
            {"objective": "slm", "slm_mtp_selection": "independent"},
            "--slm-mtp-selection independent needs --mtp-num-layers",
        ),
        (1, {"mtp_num_layers": 32}, "leaves no token of a sample"),
        (
            2,
            {"mtp_num_layers": 1, "pipeline_model_parallel_size": 2},
            "--mtp-num-layers with --pipeline-model-parallel-size above 1 needs --untie",
        ),
        (3, {"context_parallel_size": 2}, "--context-parallel-size 2 = 2. Start a multiple"),
        (2, {"context_parallel_size": 2, "seq_length": 30}, "splits each sample into 4 chunks, and --seq-length 30"),
        (
            1,
            {"objective": "slm", "slm_threshold": "predicted"},
            "--slm-threshold predicted selects over the global batch, and --slm-scope is data-parallel",
        ),
        (1, {"slm_threshold": "predicted"}, "--slm-threshold has no effect with --objective clm"),
        (
            1,
            {"objective": "slm", "reference_load": ["rm", "./rm"]},
            "--reference-load names the directory of ./rm twice",
        ),
        (
            1,
            {"objective": "slm", "reference_load": "rm", "save": "./rm"},
            "--reference-load ./rm is the --save directory of the run, whose newest checkpoint changes",
        ),
        (1, {"slm_score": "random"}, "--slm-score has no effect with --objective clm"),
        (1, {"slm_scope": "sequence"}, "--slm-scope has no effect with --objective clm"),
        (1, {"slm_exact_mode": "speculative"}, "--slm-exact-mode has no effect with --objective clm"),
        (1, {"slm_gumbel_temperature": 2}, "--slm-gumbel-temperature has no effect with --objective clm"),
        (1, {"objective": "sft", "slm_scope": "sequence"}, "--slm-scope has no effect with --objective sft"),
        (
            1,
            {"objective": "slm", "reference_scores": "rm", "reference_precision": "bf16"},
            "--reference-precision bf16 has no effect without --reference-load or --reference-history",
        ),
        (2, {"global_batch_size": 6}, "--global-batch-size 6 is not a multiple of --micro-batch-size 2 x 2"),
        (1, {"num_layers_per_virtual_pipeline_stage": 1}, "needs --pipeline-model-parallel-size above 1"),
        (
            2,
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "global_batch_size": 6},
            "the interleaved schedule needs a multiple of --pipeline-model-parallel-size 2 micro-batches",
        ),
        (1, {"overlap_param_gather": True}, "--overlap-param-gather needs --use-distributed-optimizer"),
        (1, {"use_distributed_optimizer": True, "optimizer": "sgd"}, "cannot save the state of --optimizer sgd"),
        (1, {"max_position_embeddings": 16}, "--seq-length 32 is longer than --max-position-embeddings 16"),
        (1, {"lr_warmup_iters": 10}, "--lr-warmup-iters 10 is not below the 10 steps"),
        (1, {"lr_decay_style": "WSD"}, "needs --lr-wsd-decay-iters"),
        (1, {"start_weight_decay": 0.1}, "must be given together"),
        (1, {"data_path": None}, "give --data-path"),
        (1, {"train_data_path": "x"}, "both given"),
        (1, {"finetune": True}, "--finetune needs --load"),
        (1, {"save_interval": 3}, "--save-interval needs --save"),
        (1, {"objective": "slm", "slm_selection_ratio_start": 1.0}, "needs --slm-selection-ratio-warmup-iters"),
        (1, {"eval_iters": -1}, "--eval-iters is -1, and must be 0 or more"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_invalid_relations_are_refused(world_size: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_check(world_size, **changes)
    assert message in str(error.value)


def test_a_link_to_the_save_directory_is_no_reference_model(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for name, save in (("disk", "link"), ("link", "disk"), ("link", "link")):
        with pytest.raises(ConfigError, match="is the --save directory of the run"):
            run_check(1, objective="slm", reference_load=tmp_path / name, save=tmp_path / save)


def test_unwritable_directories_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is simulated, since permissions do not restrict root; an existing cache may be complete."""

    def read_only(*_: object, **__: object) -> str:
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    with pytest.raises(ConfigError, match=r"^--save .*new: .* cannot be written .Read-only file system.") as refusal:
        run_check(1, save=tmp_path / "new", data_cache_path=tmp_path)
    assert "metrics" not in str(refusal.value)
    with pytest.raises(ConfigError, match=r"^2 problems:(?s:.*)--data-cache-path .*new(?s:.*)--slm-metrics-file .*new"):
        run_check(1, slm_metrics_file=tmp_path / "new" / "m.jsonl", data_cache_path=tmp_path / "new")
