"""Log line with the software versions of a run."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import torch
import torch.distributed as dist

from megatron_slm.runtime.groups import Groups

# The package index has another package named apex, so that NVIDIA's is recognised by an extension of it.
OPTIONAL = {"Transformer Engine": "transformer_engine", "NVIDIA apex": "amp_C"}


def describe_software(groups: Groups) -> str:
    """Return versions, device, backend and the availability of optional libraries."""
    device = torch.cuda.get_device_name() if groups.device.type == "cuda" else "CPU"
    found = [
        f"{name} {'found' if importlib.util.find_spec(module) else 'not installed'}"
        for name, module in OPTIONAL.items()
    ]
    return (
        f"megatron-core {version('megatron-core')}, torch {torch.__version__}, {groups.world_size} x {device} over "
        f"{dist.get_backend()}; {', '.join(found)}"
    )
