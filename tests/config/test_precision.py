"""Precision that the run could not have, above all FP8 that Megatron-Core would silently run in bf16, is refused."""

from __future__ import annotations

from typing import Any

import pytest
from test_checks import run_check

from megatron_slm.config.flags import parse
from megatron_slm.runtime.errors import ConfigError

SIZES: dict[str, Any] = {"hidden_size": 128, "ffn_hidden_size": 128, "num_attention_heads": 4, "seq_length": 128}
FP8: dict[str, Any] = {**SIZES, "bf16": True, "fp8_format": "hybrid"}
REFERENCE: dict[str, Any] = {**SIZES, "bf16": True, "objective": "slm", "reference_load": "x", "reference_fp8": True}
AWARE: dict[str, Any] = {"bf16": True, "use_precision_aware_optimizer": True, "use_distributed_optimizer": True}
LAYERS = {"first_last_layers_bf16": True, "num_layers": 4}
OVERLAP: dict[str, Any] = {
    "bf16": True,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "tp_comm_overlap": True,
}


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, {"fp16": True, "initial_loss_scale": 65536}),
        (1, {"bf16": True, "loss_scale": 8, "initial_loss_scale": 65536, "hysteresis": 3}),
        (1, FP8),
        (1, {**FP8, **LAYERS}),
        (1, {**FP8, **LAYERS, "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 3}),
        (1, {**FP8, "fp8_recipe": "delayed", "fp8_margin": 1, "fp8_amax_history_len": 1024, "no_fp8_wgrad": True}),
        (1, {**FP8, "fp8_recipe": "blockwise", "num_query_groups": None}),
        (1, {**FP8, "fp8_param_gather": True, "use_distributed_optimizer": True}),
        (1, {**AWARE, "exp_avg_dtype": "fp8", "main_grads_dtype": "bf16", "grad_reduce_in_bf16": True}),
        (1, {"main_grads_dtype": "fp32", "fp8_interval": 1, "fp8_recipe": "tensorwise"}),
        (2, OVERLAP),
    ],
)
def test_accepted(processes: int, changes: dict[str, Any]) -> None:
    run_check(processes, **changes)


@pytest.mark.parametrize(
    ("processes", "changes", "message"),
    [
        (1, {"fp16": True, "bf16": True}, "--fp16 and --bf16 were both given"),
        (1, {"fp16": True, "min_loss_scale": 4, "initial_loss_scale": 2}, "--min-loss-scale 4 is above --initial"),
        (1, {"fp16": True, "loss_scale": 0}, "--loss-scale is 0.0, and must be in (0, "),
        (1, {"fp16": True, "loss_scale_window": 0.5}, "--loss-scale-window is 0.5, and must be 1 or more"),
        (1, {"fp16": True, "loss_scale_window": 2.5}, "--loss-scale-window 2.5 is no number of steps"),
        (1, {"fp16": True, "initial_loss_scale": 1e39}, "--initial-loss-scale is 1e+39, and must be in (0, 8.5"),
        (1, {"loss_scale": 8}, "--loss-scale 8 has no effect in fp32"),
        (1, {**FP8, "bf16": None}, "--fp8-format hybrid needs --bf16"),
        (1, {**FP8, "bf16": None, "fp16": True}, "--fp8-format hybrid needs --bf16"),
        (1, {**FP8, "transformer_impl": "local"}, "local layers would run in bf16"),
        (1, {**FP8, "objective": "slm", "slm_score": "token-loss", "slm_backward": "filtered"}, "--slm-backward filt"),
        (1, {**FP8, "fp8_param_gather": True}, "--fp8-param-gather needs --use-distributed-optimizer"),
        (1, {**FP8, "fp8_amax_history_len": 1024}, "--fp8-amax-history-len has no effect with --fp8-recipe tensorwise"),
        (1, {**FP8, "no_fp8_wgrad": True}, "--no-fp8-wgrad has no effect with --fp8-recipe tensorwise"),
        (1, {**FP8, "disable_fp8_wgrad": True, "fp8_recipe": "blockwise"}, "--no-fp8-wgrad has no effect with"),
        (1, {**FP8, "num_layers_at_end_in_bf16": 2}, "--num-layers-at-end-in-bf16 has no effect without --first-last"),
        (1, {"num_layers_at_start_in_bf16": 2}, "--num-layers-at-start-in-bf16 has no effect without --fp8-format"),
        (1, {**FP8, **LAYERS, "fp8_recipe": "delayed"}, "--first-last-layers-bf16 cannot be combined with --fp8-rec"),
        (1, {**FP8, **LAYERS, "num_layers_at_end_in_bf16": 3}, "leave none of the 4 layers in FP8"),
        (1, {**FP8, **LAYERS, "num_layers_at_end_in_bf16": 5}, "5 is more than the 4 layers of a pipeline stage"),
        (2, {**FP8, **LAYERS, "pipeline_model_parallel_size": 2, "num_layers_at_start_in_bf16": 3}, "the 2 layers of"),
        (1, {**FP8, "hidden_size": 136}, "needs multiples of 16, but --hidden-size = 136"),
        (1, {**FP8, "ffn_hidden_size": 24}, "but --ffn-hidden-size / --tensor-model-parallel-size = 24"),
        (2, {**FP8, "ffn_hidden_size": 48, "tensor_model_parallel_size": 2}, "--tensor-model-parallel-size = 24"),
        (1, {**FP8, "seq_length": 20}, "tokens of a micro-batch per rank = 40"),
        (1, {**FP8, "num_attention_heads": 1, "kv_channels": 24}, "query, key and value channels"),
        (1, {**FP8, "fp8_recipe": "blockwise", "ffn_hidden_size": 192}, "needs multiples of 128, but --ffn-hidden"),
        (1, {"fp8_recipe": "delayed"}, "--fp8-recipe has no effect without --fp8-format"),
        (
            1,
            {"fp8_param_gather": True, "first_last_layers_bf16": True},
            "--fp8-param-gather --first-last-layers-bf16 h",
        ),
        (1, {**FP8, "fp8_recipe": "current"}, "--fp8-recipe must be one of tensorwise, delayed, blockwise, mxfp8"),
        (1, {**REFERENCE, "reference_load": None, "reference_scores": "s"}, "--reference-fp8 has no effect without"),
        (1, {**REFERENCE, "fp8_recipe": "delayed"}, "--reference-fp8 cannot be combined with --fp8-recipe delayed"),
        (1, {**REFERENCE, "transformer_impl": "local"}, "--reference-fp8 needs --transformer-impl transformer_engine"),
        (1, {**REFERENCE, "reference_precision": "fp32"}, "--reference-fp8 needs --reference-precision bf16"),
        (1, {"bf16": True, "exp_avg_dtype": "bf16"}, "--exp-avg-dtype bf16 needs --use-precision-aware-optimizer"),
        (1, {**AWARE, "use_distributed_optimizer": None}, "optimizer needs --use-distributed-optimizer"),
        (1, {**AWARE, "optimizer": "sgd"}, "--use-precision-aware-optimizer needs --optimizer adam, not sgd"),
        (1, {**AWARE, "main_grads_dtype": "bf16"}, "Add --grad-reduce-in-bf16"),
        (1, {**AWARE, "main_params_dtype": "bf16"}, "--main-params-dtype must be one of fp32, fp16"),
        (1, {"fp16": True, "grad_reduce_in_bf16": True}, "--grad-reduce-in-bf16 would reduce gradients in fp16"),
        (1, {"tp_comm_overlap": True, "sequence_parallel": True}, "--tp-comm-overlap needs --tensor-model-parallel"),
        (2, {**OVERLAP, "sequence_parallel": None}, "above 1 and --sequence-parallel"),
        (2, {**OVERLAP, "transformer_impl": "local"}, "--tp-comm-overlap needs --transformer-impl"),
        (2, {**OVERLAP, "bf16": None}, "--tp-comm-overlap needs --bf16 or --fp16"),
        (1, {"tp_comm_overlap_cfg": "x"}, "--tp-comm-overlap-cfg has no effect without --tp-comm-overlap"),
        (1, {"require_fused": "linears"}, "--require-fused must be one of linear, attention"),
    ],
)
def test_refused(processes: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_check(processes, **changes)
    assert message in str(error.value)


def test_parts_of_require_fused_are_a_list() -> None:
    assert parse(["--require-fused", "linear", "adam"]).config.training.require_fused == ["linear", "adam"]
