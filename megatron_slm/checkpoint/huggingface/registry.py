"""The supported model families. To add one, write a module in ``families`` and list it here."""

from __future__ import annotations

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.families import (
    gpt2,
    llama,
    mistral,
    mixtral,
    nemotron,
    qwen2,
    qwen3,
    qwen3_moe,
    stablelm,
)
from megatron_slm.checkpoint.huggingface.family import Family

# A model whose settings several families represent is exported as the first one.
MODULES = (llama, mistral, qwen2, qwen3, gpt2, mixtral, qwen3_moe, nemotron, stablelm)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in MODULES}

_SCALED = "it multiplies embeddings by the square root of the hidden size, which Megatron-Core's GPT model does not"
REASONS = {  # why well-known families are not supported
    "gemma": _SCALED,
    "gemma2": f"{_SCALED}, and caps attention scores",
    "gemma3": f"{_SCALED}, and has norms after attention and MLP",
    "gemma3_text": f"{_SCALED}, and has norms after attention and MLP",
    "gpt_neox": "attention and MLP of a layer run in parallel, which Megatron-Core's layers do not",
    "olmo2": "it has norms after attention and MLP, which Megatron-Core's layers do not",
}


def find_family(config: PublishedConfig) -> Family:
    """Return the family of a published model.

    Raises:
        ConfigError: the family is not supported.
    """
    if config.model_type not in FAMILIES:
        reason = f": {REASONS[config.model_type]}" if config.model_type in REASONS else ""
        supported = ", ".join(FAMILIES)
        raise config.error(f"model_type {config.model_type!r} is not supported{reason}; supported are {supported}")
    config.expect("quantization_config", (None,), "weights are quantized. Use the model in bf16 or fp32")
    return FAMILIES[config.model_type]
