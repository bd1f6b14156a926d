"""Small published models with random weights, written by the transformers library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 301,  # not a multiple of the padding
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GPT2 = {"vocab_size": 301, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}

# Model type and fields of config.json that differ from SIZES.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3, "vocab_size": 320}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-linear": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 72, "activation_function": "gelu"}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-plain": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": False}),
    "nemotron": ("nemotron", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "rope_parameters": {"partial_rotary_factor": 0.25}}),
}


IDS = torch.randint(0, SIZES["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Published:
    """Hold a published model, and the logits that the transformers library computes for IDS."""

    directory: Path
    logits: Tensor  # [b, s, vocabulary]

    @property
    def losses(self) -> Tensor:
        """Return the losses of all tokens but the first, [b, s - 1]."""
        return F.cross_entropy(self.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(2, -1)


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a model of one of the VARIANTS with random weights, biases and norms."""
    import transformers

    model_type, fields = VARIANTS[name]
    sizes = GPT2 if model_type == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **fields, **changes})
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)  # logits that differ
    return model


def save_model(name: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a model of one of the VARIANTS and its tokenizer to ``directory``, and return it."""
    model = make_model(name, dtype, **changes)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


def save_tokenizer(directory: Path, size: int = 290) -> None:
    """Write a byte-level tokenizer of ``size`` entries; <|endoftext|> (id 0) ends documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the cat and the dog ran to the old barn", "she has an apple in her hand"] * 9, trainer)
    model.add_special_tokens([f"<extra_{number}>" for number in range(size - model.get_vocab_size())])
    model.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
