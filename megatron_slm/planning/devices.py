"""Devices that runs are planned for, from data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_slm.runtime.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """Represent a device and its links; rates are peaks of the data sheet, bandwidths per direction."""

    name: str
    memory: int  # bytes
    flops: dict[str, float]  # dense peak FLOP/s by precision: fp32, bf16, fp8
    memory_bandwidth: float  # bytes/s
    node_bandwidth: float  # bytes/s to devices of the same node
    network_bandwidth: float  # bytes/s per device to other nodes
    per_node: int  # devices of a node
    reserve: int  # bytes that the driver, the context and the communication library take: an assumption
    used_share: float  # of the memory that plans use at most, since the memory of GPUs is not measured
    fragmentation: float  # share of activations and workspace that the allocator cannot reuse: an assumption
    source: str
    is_gpu: bool = True

    @property
    def usable(self) -> int:
        """Return the bytes that a plan may use."""
        return int(self.used_share * self.memory)

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s of a precision; fp16 is as fast as bf16."""
        precision = "bf16" if precision == "fp16" else precision
        if precision not in self.flops:
            raise ConfigError(
                f"--gpu {self.name} has no {precision}. Use --bf16 without --fp8-format, or another device."
            )
        return self.flops[precision]

    def bandwidth(self, group: int, members: int) -> float:
        """Return the bytes/s per rank of a collective over ``group`` ranks, of which ``members`` share a node.

        A ring that spans nodes uses the network adapters of all its members.
        """
        return self.node_bandwidth if members >= group else min(members * self.network_bandwidth, self.node_bandwidth)


# Dense rates: the data sheets' values "with sparsity" are halved. NVLink's bandwidth is half of the sum of both
# directions. The network is that of a DGX with one adapter per GPU: 400 Gb/s, A100 200 Gb/s.
# H100, H200: https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest
# has adapters and memory; https://glennklockwood.com/garden/processors/h100 and .../A100 list the data sheets' rates.
H100 = Device(
    name="h100",
    memory=81_559 << 20,  # as nvidia-smi reports it
    flops={"fp32": 67e12, "bf16": 989.4e12, "fp8": 1978.9e12},
    memory_bandwidth=3.35e12,
    node_bandwidth=450e9,
    network_bandwidth=50e9,
    per_node=8,
    reserve=2 * GIB,
    used_share=0.95,
    fragmentation=0.05,
    source="NVIDIA H100 Tensor Core GPU data sheet (SXM5); DGX BasePOD reference architecture",
)
H200 = replace(
    H100,
    name="h200",
    memory=141 * 10**9,
    memory_bandwidth=4.8e12,
    source="NVIDIA H200 Tensor Core GPU data sheet (SXM); DGX BasePOD reference architecture",
)
A100 = replace(
    H100,
    name="a100",
    memory=80 * GIB,
    flops={"fp32": 19.5e12, "bf16": 312e12},
    memory_bandwidth=2.039e12,
    node_bandwidth=300e9,
    network_bandwidth=25e9,
    source="NVIDIA A100 Tensor Core GPU data sheet 1758950-r4 (SXM4, 80 GB); NVIDIA DGX A100",
)
DEVICES = {device.name: device for device in (H100, H200, A100)}
CPU = "cpu"


def cpu_device(memory: int, processes: int) -> Device:
    """Return this machine's CPU, whose memory ``processes`` ranks share; rates are measured, not looked up."""
    return Device(
        name=CPU,
        memory=memory // processes,
        flops={},
        memory_bandwidth=0.0,
        node_bandwidth=0.0,
        network_bandwidth=0.0,
        per_node=processes,
        reserve=400 << 20,  # interpreter and libraries
        used_share=1.0,
        fragmentation=0.0,
        source="this machine",
        is_gpu=False,
    )
