"""The supported model families. To add one, write a module in ``families`` and list it here."""

from __future__ import annotations

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.families import gpt2, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from megatron_slm.checkpoint.huggingface.family import Family

# A model whose settings several families represent is exported as the first one.
MODULES = (llama, mistral, qwen2, qwen3, gpt2, mixtral, qwen3_moe)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in MODULES}


def find_family(config: PublishedConfig) -> Family:
    """Return the family of a published model.

    Raises:
        ConfigError: the family is not supported.
    """
    if config.model_type not in FAMILIES:
        raise config.error(f"model_type {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    config.expect("quantization_config", (None,), "weights are quantized. Use the model in bf16 or fp32")
    return FAMILIES[config.model_type]
