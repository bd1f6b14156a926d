"""Precision settings reach every field of Megatron-Core's configurations, and FP8 is refused where it would not run."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_slm.config.flags import parse
from megatron_slm.config.relations.model import attention_problem
from megatron_slm.config.schema import PrecisionConfig, RunConfig
from megatron_slm.mcore import transformer_engine
from megatron_slm.model import fp8, specs
from megatron_slm.model.fp8 import check_fp8, frozen_fp8
from megatron_slm.model.gpt import transformer_config
from megatron_slm.reference.replica import _check_attention
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.training import optimizer as training_optimizer
from megatron_slm.training.preflight import slow_products

MODEL = "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --lr 1"
GPU, CPU = torch.device("cuda"), torch.device("cpu")
FP8 = "--bf16 --fp8-format hybrid"
DELAYED = "--fp8-recipe delayed --fp8-margin 2 --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --no-fp8-wgrad"
LAYERS = "--first-last-layers-bf16 --num-layers-at-start-in-bf16 2 --num-layers-at-end-in-bf16 0"
SCALING = "--initial-loss-scale 65536 --min-loss-scale 2 --loss-scale-window 50 --hysteresis 3"
DTYPES = "--main-grads-dtype bf16 --main-params-dtype fp16 --exp-avg-dtype fp8 --exp-avg-sq-dtype bf16"


def settings(flags: str) -> RunConfig:
    return parse(f"{MODEL} {flags}".split()).config


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ("", {"fp8": None, "fp16": False, "bf16": False, "params_dtype": torch.float32, "tp_comm_overlap": False}),
        ("--fp16", {"fp16": True, "bf16": False, "params_dtype": torch.float16, "pipeline_dtype": torch.float16}),
        (FP8, {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": False, "fp8_wgrad": True, "bf16": True}),
        (f"{FP8} --fp8-param-gather", {"fp8_param": True, "params_dtype": torch.bfloat16}),
        (
            f"--bf16 --fp8-format e4m3 {DELAYED}",
            {
                "fp8": "e4m3",
                "fp8_recipe": "delayed",
                "fp8_margin": 2,
                "fp8_amax_history_len": 1024,
                "fp8_amax_compute_algo": "max",
                "fp8_wgrad": False,
            },
        ),
        (
            f"{FP8} {LAYERS}",
            {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 0},
        ),
        ("--tp-comm-overlap", {"tp_comm_overlap": True, "tp_comm_bootstrap_backend": "nccl"}),
    ],
)
def test_transformer_fields(flags: str, fields: dict[str, Any]) -> None:
    config, groups = settings(flags), SimpleNamespace(device=CPU)
    found = transformer_config(
        *(config.model, config.parallel, config.training, groups, "local"),  # type: ignore[arg-type]
        params_dtype=config.training.params_dtype,
        precision=config.precision,
    )
    assert {name: getattr(found, name) for name in fields} == fields


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the signature of Transformer Engine's fused Adam, which Megatron-Core inspects."""

    def adam(master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any, use_decoupled_grad: Any) -> None: ...

    module = ModuleType("transformer_engine.pytorch.optimizers")
    module.FusedAdam = adam  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: True)


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ("", {"fp16": False, "bf16": False, "loss_scale": None, "initial_loss_scale": 2**32, "fp8_recipe": None}),
        (
            f"--fp16 {SCALING}",
            {
                "fp16": True,
                "initial_loss_scale": 65536,
                "min_loss_scale": 2,
                "loss_scale_window": 50,
                "hysteresis": 3,
                "params_dtype": torch.float16,
            },
        ),
        ("--bf16 --loss-scale 8", {"bf16": True, "loss_scale": 8, "params_dtype": torch.bfloat16}),
        (FP8, {"fp8_recipe": "tensorwise"}),
        (
            f"--bf16 --use-distributed-optimizer --use-precision-aware-optimizer {DTYPES}",
            {
                "use_precision_aware_optimizer": True,
                "main_grads_dtype": torch.bfloat16,
                "main_params_dtype": torch.float16,
                "exp_avg_dtype": torch.uint8,
                "exp_avg_sq_dtype": torch.bfloat16,
                "use_precision_aware_optimizer_no_fp8_or_ds_fp8": True,
            },
        ),
        (
            f"{FP8} --use-distributed-optimizer --use-precision-aware-optimizer",
            {"fp8_recipe": "tensorwise", "use_precision_aware_optimizer_no_fp8_or_ds_fp8": False},
        ),
    ],
)
def test_optimizer_fields(engine: None, flags: str, fields: dict[str, Any]) -> None:
    found = training_optimizer.optimizer_config(settings(flags))
    assert {name: getattr(found, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ("--bf16", {"grad_reduce_in_fp32": True, "fp8_param_gather": False}),
        ("--bf16 --grad-reduce-in-bf16", {"grad_reduce_in_fp32": False}),
        (f"{FP8} --fp8-param-gather --use-distributed-optimizer", {"fp8_param_gather": True}),
    ],
)
def test_buffer_fields(flags: str, fields: dict[str, Any]) -> None:
    found = training_optimizer.data_parallel_config(settings(flags))
    assert {name: getattr(found, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("flags", "device", "precision", "warns"),
    [
        ("", GPU, "highest", True),
        ("", GPU, "high", False),
        ("--bf16", GPU, "highest", False),
        ("--fp16", GPU, "highest", False),
        ("", CPU, "highest", False),
    ],
)
def test_products_without_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, flags: str, device: torch.device, precision: str, warns: bool
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    warning = slow_products(settings(flags), device)
    assert (warning is not None) == warns
    assert warning is None or ("--bf16" in warning and "TF32" in warning)


def hopper(monkeypatch: pytest.MonkeyPatch, engine: tuple[int, int] = (2, 11), cuda: str = "12.9") -> None:
    monkeypatch.setattr(fp8, "engine_version", lambda: engine)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_hopper_runs_fp8(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    hopper(monkeypatch)
    check_fp8(PrecisionConfig(fp8_format="hybrid", fp8_recipe=recipe), "transformer_engine", GPU)


@pytest.mark.parametrize(
    ("recipe", "implementation", "device", "machine", "message"),
    [
        ("tensorwise", "local", CPU, {}, "needs a GPU"),
        ("tensorwise", "local", GPU, {}, "local layers would run in bf16"),
        ("mxfp8", "transformer_engine", GPU, {}, r"compute capability 10.0 \(found: 9.0\). Use --fp8-recipe tensor"),
        ("blockwise", "transformer_engine", GPU, {"cuda": "12.8"}, r"CUDA 12.9 \(found: 12.8\)"),
        ("tensorwise", "transformer_engine", GPU, {"engine": (2, 1)}, r"Transformer Engine 2.2 \(found: 2.1\)"),
    ],
)
def test_machines_without_fp8(
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    implementation: str,
    device: torch.device,
    machine: dict[str, Any],
    message: str,
) -> None:
    hopper(monkeypatch, **machine)
    for precision in (PrecisionConfig(fp8_format="hybrid", fp8_recipe=recipe), PrecisionConfig(fp8_recipe=recipe)):
        checked = precision if precision.fp8_format else frozen_fp8(precision)
        with pytest.raises(ConfigError, match=message):
            check_fp8(checked, implementation, device)


def test_frozen_model_has_fp8_weights_only() -> None:
    assert frozen_fp8(settings(f"{FP8} {LAYERS} --fp8-recipe blockwise").precision) == PrecisionConfig(
        fp8_format="hybrid", fp8_recipe="blockwise", fp8_param_gather=True
    )


def test_broken_engine_is_refused_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "engine_problem", lambda: "it cannot be imported (undefined symbol)")
    with pytest.raises(ConfigError, match="undefined symbol"):
        specs.choose_implementation("transformer_engine", GPU, "bf16")
    assert {specs.choose_implementation(name, GPU, "bf16") for name in (None, "local")} == {"local"}


@pytest.mark.parametrize(
    ("requested", "params_dtype", "chosen"),
    [
        (None, "bf16", "transformer_engine"),
        (None, "fp16", "transformer_engine"),
        (None, "fp32", "local"),
        ("transformer_engine", "fp32", "transformer_engine"),
        ("local", "bf16", "local"),
    ],
)
def test_layers_in_fp32_are_local(
    monkeypatch: pytest.MonkeyPatch, requested: str | None, params_dtype: str, chosen: str
) -> None:
    """Transformer Engine would multiply in TF32, and has no fused attention for fp32."""
    monkeypatch.setattr(specs, "engine_problem", lambda: None)
    assert specs.choose_implementation(requested, GPU, params_dtype) == chosen
    if chosen == "local":
        reason = specs.IN_FP32 if params_dtype == "fp32" else "--transformer-impl local"
        assert specs.local_reason(GPU, params_dtype) == reason


@pytest.mark.parametrize(
    ("flags", "params_dtype", "message"),
    [
        ("--reset-attention-mask", "bf16", None),
        ("--context-parallel-size 2", "bf16", None),
        ("", "fp32", None),
        ("--reset-attention-mask", "fp32", "attention in fp32 supports neither"),
        ("--context-parallel-size 2", "fp32", "attention in fp32 supports neither"),
        ("--reset-attention-mask --context-parallel-size 2", "bf16", "context-parallel-size above 1. Use"),
    ],
)
def test_attention_of_transformer_engine(
    monkeypatch: pytest.MonkeyPatch, flags: str, params_dtype: str, message: str | None
) -> None:
    monkeypatch.setattr(specs, "engine_problem", lambda: None)
    config = settings(f"{flags} {'' if params_dtype == 'fp32' else '--' + params_dtype}")
    check = partial(_check_attention, "transformer_engine", config, params_dtype, GPU)
    if message is None:
        check()
        return
    with pytest.raises(ConfigError, match=message):
        check()
    assert attention_problem(config, config.training.params_dtype) is not None


def test_engine_problem_names_the_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(transformer_engine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(transformer_engine.importlib, "import_module", fail)
    assert transformer_engine.engine_problem.__wrapped__() == "it cannot be imported (undefined symbol: _ZN3c10)"


@pytest.mark.parametrize(("version", "modes"), [("2.11.0", ["fp8", "none"]), ("2.4.0", None)])
def test_user_buffers(monkeypatch: pytest.MonkeyPatch, version: str, modes: list[str] | None) -> None:
    called: dict[str, Any] = {}
    base = SimpleNamespace(
        initialize_ub=called.update, UserBufferQuantizationMode=SimpleNamespace(FP8="fp8", NONE="none")
    )
    modules = {
        "transformer_engine": SimpleNamespace(__version__=version),
        "transformer_engine.pytorch.module.base": base,
    }
    monkeypatch.setattr(transformer_engine.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    transformer_engine.initialize_user_buffers(
        shape=(64, 128),
        dtype=torch.float16,
        tensor_parallel_size=2,
        settings={},
        uses_fp8=True,
        uses_high_precision=True,
        bootstrap_backend="nccl",
    )
    assert called.pop("quantization_modes", None) == modes and called.pop("use_fp8", None) == (None if modes else True)
    assert called.pop("dtype") == torch.float16
    assert called == {"shape": [64, 128], "tp_size": 2, "ub_cfgs": {}, "bootstrap_backend": "nccl"}
