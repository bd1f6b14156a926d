"""Published throughputs, from which the speed of matrix products and kernels is derived.

Each row is a measurement with its layout and source. Nothing is estimated from other rows: interpolation happens in
``step_time.py`` and is reported with the rows it uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_slm.config.schema import ModelConfig
from megatron_slm.model.size import parameter_count, training_flops_per_token

BRIDGE = "Megatron-Bridge 067f987d, docs/performance-summary-archive.md, pre-training on DGX-H100, NeMo container"
MEGATRON_LM = "Megatron-LM d98e8a64, README.md, images/model_table.png"
# Layouts and times are read from Calculon's copy (calculon-ai/calculon, validation/*_seqsel.json and
# calculon/llm/validation.py); vocabulary and sequence length from Megatron-LM's README of 2022, whose MFU agrees with
# the times within 0.5 %.
KORTHIKANTI = "Korthikanti et al. 2022, arXiv 2205.05198, table 5; Megatron-LM 2e90a342, README.md"
RHO_1 = "Rho-1, arXiv 2404.07965, section 3.1 (hours of 32 H100, reference model included)"


@dataclass(frozen=True)
class Measurement:
    """Represent a published throughput."""

    name: str
    device: str
    precision: str
    model: ModelConfig
    vocab_size: int
    gpus: int
    layout: tuple[int, int, int, int]  # TP, PP, CP, virtual stages
    micro_batch: int
    global_batch: int
    tokens_per_second: float  # per device
    source: str
    experts: int = 1  # degree of expert parallelism
    has_fp32_gradients: bool = True  # gradients are reduced in fp32
    has_exposed_communication: bool = False  # tensor-parallel communication does not overlap
    recomputation: str | None = None  # granularity

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return parameter_count(self.model, self.vocab_size)

    @property
    def model_flops(self) -> float:
        """Return the model FLOP/s per device by the count of ``model/size.py`` (causal attention counts half)."""
        return training_flops_per_token(self.model, self.vocab_size) * self.tokens_per_second


def _gpt(layers: int, hidden: int, heads: int, length: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        kv_channels=hidden // heads,
        seq_length=length,
        max_position_embeddings=length,
        untie_embeddings_and_output_weights=True,
    )


def _llama(layers: int, hidden: int, ffn: int, heads: int, groups: int, length: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=groups if groups != heads else None,
        kv_channels=hidden // heads,
        seq_length=length,
        max_position_embeddings=length,
        normalization="RMSNorm",
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )


def _weak_scaling(
    name: str, layers: int, hidden: int, heads: int, tensor: int, pipeline: int, gpus: int, batch: int, tflops: float
) -> Measurement:
    """Return a row of Megatron-LM's table, whose FLOPs count full attention: 72 s l h^2 (1 + s / 6h + V / 12lh)."""
    length, vocabulary = 4096, 131072
    per_token = 72 * layers * hidden**2 * (1 + length / (6 * hidden) + vocabulary / (12 * layers * hidden))
    return Measurement(
        f"GPT {name}",
        "h100",
        "bf16",
        _gpt(layers, hidden, heads, length),
        vocabulary,
        gpus,
        (tensor, pipeline, 1, layers // pipeline if pipeline > 1 else 1),
        1,
        batch,
        tflops * 1e12 / per_token,
        MEGATRON_LM,
        has_fp32_gradients=False,
    )


def _recomputation(
    name: str, layers: int, hidden: int, heads: int, layout: tuple[int, int], virtual: int, gpus: int, seconds: float
) -> Measurement:
    """Return a row of Korthikanti et al. (sequence parallelism, selective recomputation), of seconds per step."""
    batch = {8: 4, 64: 64, 280: 280, 512: 512}[gpus]
    return Measurement(
        f"GPT {name}",
        "a100",
        "bf16",
        _gpt(layers, hidden, heads, 2048),
        51200,
        gpus,
        (*layout, 1, virtual),
        4 if gpus == 8 else 1,
        batch,
        batch * 2048 / seconds / gpus,
        KORTHIKANTI,
        has_exposed_communication=True,
        recomputation="selective",
    )


def _experts(layers: int, hidden: int, ffn: int, attention: tuple[int, int, int], top: int) -> ModelConfig:
    """Return a model with 128 experts and a sequence length of 4,096; attention is heads, groups and head size."""
    heads, groups, size = attention
    dense = _llama(layers, hidden, ffn, heads, groups, 4096)
    return replace(dense, kv_channels=size, num_experts=128, moe_router_topk=top, moe_ffn_hidden_size=ffn)


# GPT-OSS has sliding windows in half of its layers; full attention is counted.
GPT_OSS = _experts(36, 2880, 2880, (64, 8, 64), 4)
QWEN3_30B = _experts(48, 2048, 768, (32, 4, 128), 8)
QWEN3_235B = _experts(94, 4096, 1536, (64, 4, 128), 8)


LLAMA3_8B = _llama(32, 4096, 14336, 32, 8, 8192)
LLAMA3_70B = _llama(80, 8192, 28672, 64, 8, 8192)
LLAMA3_405B = _llama(126, 16384, 53248, 128, 8, 8192)

# The table of weak scaling does not publish virtual stages, micro-batch size and the dtype of reduced gradients. Its
# rows are read with one layer per chunk, one sample and bf16, so that little time is attributed to bubbles and
# communication: the derived efficiencies are lower than with other assumptions, and plans slower.
MEASUREMENTS = (
    _weak_scaling("1.7B", 24, 2048, 16, 1, 1, 48, 192, 408.8),
    _weak_scaling("7.1B", 30, 4096, 32, 2, 1, 96, 192, 465.9),
    _weak_scaling("16B", 32, 6144, 48, 4, 1, 192, 192, 489.1),
    _weak_scaling("32B", 48, 7168, 56, 8, 1, 384, 192, 459.6),
    _weak_scaling("70B", 84, 8192, 64, 8, 2, 768, 384, 419.7),
    _weak_scaling("119B", 92, 10240, 80, 8, 4, 1536, 768, 420.5),
    _weak_scaling("177B", 96, 12288, 96, 8, 6, 2304, 1152, 432.8),
    _weak_scaling("314B", 96, 16384, 128, 8, 8, 3072, 1536, 474.4),
    _weak_scaling("462B", 112, 18432, 144, 8, 16, 6144, 3072, 459.9),
    Measurement(
        "Llama-3 8B", "h100", "fp8", LLAMA3_8B, 128256, 8, (1, 1, 1, 1), 1, 128, 14451, f"{BRIDGE} 25.11 (FSDP)"
    ),
    Measurement("Llama-3 70B", "h100", "fp8", LLAMA3_70B, 128256, 64, (4, 8, 1, 5), 1, 256, 1664, f"{BRIDGE} 26.04.01"),
    Measurement(
        "Llama-3.1 405B", "h100", "fp8", LLAMA3_405B, 128256, 1024, (8, 8, 2, 8), 1, 1536, 328, f"{BRIDGE} 26.04.01"
    ),
    Measurement(
        "GPT-OSS 120B",
        "h100",
        "bf16",
        GPT_OSS,
        201088,
        64,
        (1, 4, 1, 1),
        1,
        1280,
        5824,
        f"{BRIDGE} 26.04.01",
        experts=8,
    ),
    Measurement(
        "Qwen3 30B-A3B",
        "h100",
        "fp8",
        QWEN3_30B,
        151936,
        16,
        (1, 1, 1, 1),
        1,
        1024,
        8960,
        f"{BRIDGE} 26.04.01",
        experts=16,
    ),
    Measurement(
        "Qwen3 235B-A22B",
        "h100",
        "fp8",
        QWEN3_235B,
        151936,
        256,
        (2, 8, 1, 4),
        1,
        8192,
        1712,
        f"{BRIDGE} 26.04.01",
        experts=32,
    ),
    _recomputation("22B", 48, 6144, 64, (8, 1), 1, 8, 1.10),
    _recomputation("175B", 96, 12288, 96, (8, 8), 3, 64, 13.75),
    _recomputation("530B", 105, 20480, 128, (8, 35), 3, 280, 37.83),
    _recomputation("1T", 128, 25600, 160, (8, 64), 1, 512, 71.49),
)
# The paper's runs, for comparison; they used another trainer, so that nothing is derived from them.
PAPER = (
    Measurement(
        "TinyLlama-1.1B, SLM",
        "h100",
        "bf16",
        _llama(22, 2048, 5632, 32, 4, 2048),
        32000,
        32,
        (1, 1, 1, 1),
        1,
        512,
        15e9 / (3.5 * 3600 * 32),
        RHO_1,
    ),
    Measurement(
        "Mistral-7B, SLM",
        "h100",
        "bf16",
        _llama(32, 4096, 14336, 32, 8, 4096),
        32000,
        32,
        (1, 1, 1, 1),
        1,
        256,
        15e9 / (18 * 3600 * 32),
        RHO_1,
    ),
)
