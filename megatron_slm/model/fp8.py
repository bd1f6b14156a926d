"""FP8 by Transformer Engine: requirements of recipes, and frozen models whose weights are in FP8 only."""

from __future__ import annotations

import torch

from megatron_slm.config.schema import PrecisionConfig
from megatron_slm.mcore.transformer_engine import engine_problem, engine_version
from megatron_slm.runtime.errors import ConfigError

# Recipe -> version of Transformer Engine, compute capability and CUDA version that it needs.
REQUIREMENTS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "delayed": ((1, 0), (8, 9), (12, 0)),
    "tensorwise": ((2, 2), (8, 9), (12, 0)),
    "blockwise": ((2, 3), (9, 0), (12, 9)),
    "mxfp8": ((2, 1), (10, 0), (12, 8)),
}


def frozen_fp8(precision: PrecisionConfig) -> PrecisionConfig:
    """Return the settings of a frozen model with the run's recipe, whose linear layers are all in FP8 only."""
    return PrecisionConfig(
        fp8_format=precision.fp8_format or "hybrid", fp8_recipe=precision.fp8_recipe, fp8_param_gather=True
    )


def check_fp8(precision: PrecisionConfig, implementation: str, device: torch.device) -> None:
    """Validate that FP8, if requested, runs on this machine.

    Without Transformer Engine's layers, Megatron-Core would train in bf16 without a message.

    Args:
        precision: settings of the run, or of a frozen model.
        implementation: layer implementation of the model.
        device: device of the model.

    Raises:
        ConfigError: Transformer Engine's layers are not used, or the recipe is not supported here.
    """
    if precision.fp8_format is None:
        return
    flag = f"FP8 (--fp8-format or --reference-fp8, --fp8-recipe {precision.fp8_recipe})"
    if device.type != "cuda":
        raise ConfigError(f"{flag} needs a GPU of compute capability 8.9 or later. Leave the flag out on a CPU.")
    if implementation != "transformer_engine":
        raise ConfigError(
            f"{flag} needs Transformer Engine: {engine_problem() or 'layers are local'}, and local layers would run in "
            "bf16. Install it with pip install .[hopper], or leave the flag out."
        )
    needed = dict(
        zip(("Transformer Engine", "compute capability", "CUDA"), REQUIREMENTS[precision.fp8_recipe], strict=True)
    )
    found = {
        "Transformer Engine": engine_version(),
        "compute capability": torch.cuda.get_device_capability(device),
        "CUDA": _version(torch.version.cuda),
    }
    missing = [
        f"{name} {_shown(least)} (found: {_shown(found[name])})"
        for name, least in needed.items()
        if found[name] < least
    ]
    if missing:
        other = "tensorwise" if precision.fp8_recipe in ("mxfp8", "blockwise") else "delayed"
        raise ConfigError(f"{flag} needs {', '.join(missing)}. Use --fp8-recipe {other}, or leave FP8 out.")


def _version(text: str | None) -> tuple[int, int]:
    numbers = (text or "0.0").split(".")
    return int(numbers[0]), int(numbers[1])


def _shown(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
