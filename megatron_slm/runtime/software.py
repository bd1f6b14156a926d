"""Software versions and hardware of a run."""

from __future__ import annotations

import importlib.util
import platform
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_slm
from megatron_slm.runtime.groups import Groups

# The package index has another package named apex, so that NVIDIA's is recognized by an extension of it.
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


def environment() -> dict[str, Any]:
    """Return versions, host, working directory, devices and processes of this start of a run."""
    has_gpu = torch.cuda.is_available()
    return {
        "megatron_slm": megatron_slm.__version__,
        "megatron_core": version("megatron-core"),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if has_gpu else None,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "directory": str(Path.cwd()),
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
    }
