"""Settings of FP8, loss scaling, and optimizer state in lower precision."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.constraints import flag

LARGEST_SCALE = 2.0**126  # an fp32 number, with which the loss is finite


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """FP8, loss scaling and optimizer precision"""

    fp8_format: str | None = flag(
        None,
        "run the linear layers of the transformer in FP8, with Transformer Engine; e4m3: for all tensors; hybrid: e4m3 "
        "for activations and weights, e5m2 for gradients",
        choices=("e4m3", "hybrid"),
        core="model.fp8",
    )
    fp8_recipe: str = flag(
        "tensorwise",
        "scaling recipe of FP8 (Megatron-LM: delayed); tensorwise: current maximum of a tensor; delayed: maxima of "
        "earlier steps; blockwise: per block of 128 values; mxfp8: per block of 32 values, on Blackwell",
        choices=("tensorwise", "delayed", "blockwise", "mxfp8"),
        core="model",
    )
    fp8_param_gather: bool = flag(
        False,
        "keep the weights in FP8 and gather them in FP8; requires the distributed optimizer",
        core="model.fp8_param ddp",
    )
    fp8_margin: int = flag(0, "margin of the scaling factors of the recipe delayed", at_least=0, core="model")
    fp8_amax_history_len: int = flag(
        1, "number of steps whose maxima the recipe delayed records per tensor", above=0, core="model"
    )
    fp8_amax_compute_algo: str = flag(
        "most_recent",
        "maximum of the history that the recipe delayed uses",
        choices=("most_recent", "max"),
        core="model",
    )
    fp8_wgrad: bool = flag(
        True, "compute weight gradients in FP8; --no-fp8-wgrad is supported by the recipe delayed", core="model"
    )
    first_last_layers_bf16: bool = flag(
        False, "run the first and last layers in bf16; not with the recipe delayed", core="model"
    )
    num_layers_at_start_in_bf16: int = flag(
        1, "number of first layers that --first-last-layers-bf16 runs in bf16", at_least=0, core="model"
    )
    num_layers_at_end_in_bf16: int = flag(
        1, "number of last layers that --first-last-layers-bf16 runs in bf16", at_least=0, core="model"
    )
    loss_scale: float | None = flag(
        None,
        "static loss scale, a power of 2; default with --fp16: dynamic loss scaling",
        above=0,
        at_most=LARGEST_SCALE,
        core="optimizer",
    )
    initial_loss_scale: float = flag(
        2.0**32, "initial dynamic loss scale", above=0, at_most=LARGEST_SCALE, core="optimizer"
    )
    min_loss_scale: float = flag(1.0, "minimum dynamic loss scale", above=0, at_most=LARGEST_SCALE, core="optimizer")
    loss_scale_window: float = flag(
        1000, "number of steps without overflow that double the dynamic loss scale", at_least=1, core="optimizer"
    )
    hysteresis: int = flag(
        2, "number of steps with overflow before the dynamic loss scale is halved", above=0, core="optimizer"
    )
    use_precision_aware_optimizer: bool = flag(
        False,
        "use Transformer Engine's fused Adam, which can keep main parameters, gradients and moments in lower precision",
        core="optimizer",
    )
    main_grads_dtype: str = flag(
        "fp32", "dtype of main gradients with --use-precision-aware-optimizer", choices=("fp32", "bf16")
    )
    main_params_dtype: str = flag(
        "fp32", "dtype of main parameters with --use-precision-aware-optimizer", choices=("fp32", "fp16")
    )
    exp_avg_dtype: str = flag(
        "fp32",
        "dtype of Adam's first moment with --use-precision-aware-optimizer",
        choices=("fp32", "fp16", "bf16", "fp8"),
    )
    exp_avg_sq_dtype: str = flag(
        "fp32",
        "dtype of Adam's second moment with --use-precision-aware-optimizer",
        choices=("fp32", "fp16", "bf16", "fp8"),
    )

    @property
    def has_dynamic_loss_scale(self) -> bool:
        """Return whether fp16 runs adapt the loss scale to overflows."""
        return not self.loss_scale
