"""A GPT model of a few small layers, without a run around it."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.schema import ModelConfig, ObjectiveConfig, ParallelConfig, TrainingConfig
from megatron_slm.model.gpt import build_model
from megatron_slm.runtime.groups import Groups


def build_tiny_gpt(
    groups: Groups,
    length: int,
    vocab_size: int,
    settings: dict[str, Any],
    *,
    objective: ObjectiveConfig | None = None,
    **options: Any,
) -> Any:
    """Build a model in fp32 without dropout, whose weights are large, so that differences are visible.

    Args:
        groups: groups of one rank.
        length: sequence length.
        vocab_size: tokenizer size.
        settings: settings of the model that differ from those here.
        objective: settings of the LM head.
        options: further arguments of :func:`build_model`.
    """
    model = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": length,
        "max_position_embeddings": length,
        "init_method_std": 0.5,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    (chunk,) = build_model(
        ModelConfig(**{**model, **settings}),
        vocab_size=vocab_size,
        parallel=ParallelConfig(),
        training=TrainingConfig(),
        objective=objective or ObjectiveConfig(),
        groups=groups,
        params_dtype="fp32",
        **options,
    )
    return chunk
