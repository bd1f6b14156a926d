"""Order of a GPU's kernels, which CUDA reads from the environment; this module does not import torch."""

from __future__ import annotations

import os

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"  # hardware queues of a GPU


def needs_kernel_order(tensor: int, context: int) -> bool:
    """Return whether communication of tensor and context parallelism is hidden behind matrix products."""
    return tensor > 1 or context > 1


def order_kernels(tensor: int, context: int) -> None:
    """Let a GPU start kernels in the order of their launch; a value of the user's takes precedence.

    Megatron-Core launches communication of tensor and context parallelism before the matrix products that hide it. Call
    this before any question to CUDA, such as whether there is a GPU, which initializes the driver.
    """
    if needs_kernel_order(tensor, context) and not os.environ.get(CONNECTIONS):
        os.environ[CONNECTIONS] = "1"
