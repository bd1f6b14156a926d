"""Weight gradients that matrix products add to the gradient buffer, by Transformer Engine or by apex's kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager

from megatron.core.tensor_parallel import layers

from megatron_slm.mcore.patching import replaced_attributes

apex_is_available: bool = layers._grad_accum_fusion_available


def fuses_weight_gradients(implementation: str) -> bool:
    """Return whether the linear layers of a layer implementation can add to the gradient buffer on a GPU."""
    return implementation == "transformer_engine" or apex_is_available


def fusion_without_apex() -> AbstractContextManager[None]:
    """Let models with Transformer Engine's linear layers be built with fusion if apex is not installed.

    Megatron-Core (0.16 to 0.19) builds the LM head as ColumnParallelLinear, which refuses the setting without apex's
    kernel. The LM head here never calls the kernel: it adds to the gradient buffer itself.
    """
    return replaced_attributes((layers, "_grad_accum_fusion_available", True))
