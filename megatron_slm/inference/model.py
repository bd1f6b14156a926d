"""Models for inference, from checkpoints or from a training run, in any parallel layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_slm.checkpoint.frozen import load_frozen_model
from megatron_slm.checkpoint.source import CheckpointSource, open_source
from megatron_slm.config.recipe import from_flat_dict, to_flat_dict
from megatron_slm.config.relations import inference_violations
from megatron_slm.config.schema import ParallelConfig, RunConfig
from megatron_slm.runtime.collective import on_every_rank, on_first_rank
from megatron_slm.runtime.errors import ConfigError, refuse
from megatron_slm.runtime.groups import Groups
from megatron_slm.tokenizers.tokenizer import Tokenizer, build_run_tokenizer


@dataclass(frozen=True)
class InferenceModel:
    """Hold a model in evaluation mode, its tokenizer and its process groups.

    :func:`open_model` loads one from a checkpoint. A training run can pass its model chunks while they are in
    evaluation mode. :func:`megatron_slm.inference.scoring.score_tokens` and
    :func:`megatron_slm.inference.generation.generate` use it.
    """

    chunks: Sequence[torch.nn.Module]  # of this rank
    config: RunConfig  # model settings and layout
    tokenizer: Tokenizer
    groups: Groups
    identity: str = ""  # identifies the checkpoint and its precision; empty during training
    directory: Path | None = None  # of the checkpoint

    @property
    def context_length(self) -> int:
        """Return the maximum number of tokens of a sequence, --max-position-embeddings."""
        return self.config.model.max_position_embeddings


def open_model(
    path: str,
    parallel: ParallelConfig,
    groups: Groups,
    *,
    step: int | None = None,
    flag: str = "--load",
    precision: str | None = None,
    tokenizer_settings: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> InferenceModel:
    """Load the model of a checkpoint for inference. Collective over all ranks.

    Args:
        path: checkpoint directory, or directory of a published model.
        parallel: layout, which may differ from that of the training run.
        groups: process groups of the layout.
        step: iteration to load; None for the newest.
        flag: flag that names ``path``, for error messages.
        precision: "fp32", "bf16" or "fp16"; None for that of the training run.
        tokenizer_settings: tokenizer settings that replace those of the training run, by name.
        verify: compare the files of the checkpoint with their checksums.

    Raises:
        ConfigError: the checkpoint is missing or damaged, its tokenizer cannot be built or is another one, or the
            layout does not divide the model.
    """
    source = open_source(path, step, flag, verify=verify)
    config = on_first_rank(lambda: _inference_config(source, parallel, groups.world_size))
    tokenizer = on_every_rank(partial(checkpoint_tokenizer, source, config, tokenizer_settings or {}))
    params_dtype = precision or config.training.params_dtype
    chunks = load_frozen_model(
        config,
        source.load_weights,
        vocab_size=tokenizer.vocab_size,
        groups=groups,
        params_dtype=params_dtype,
    )
    identity = f"{on_first_rank(source.identity)} {params_dtype}"
    return InferenceModel(chunks, config, tokenizer, groups, identity, source.directory)


def _inference_config(source: CheckpointSource, parallel: ParallelConfig, world_size: int) -> RunConfig:
    """Return the saved configuration with the layout and the modules of inference.

    Layers are local, since Transformer Engine ignores the mask of padded prompts.
    """
    saved = source.config()
    model = replace(
        saved.model, transformer_impl="local", moe_grouped_gemm=False, moe_token_dispatcher_type="allgather"
    )
    config = replace(saved, model=model, parallel=parallel, data=replace(saved.data, reset_position_ids=False))
    refuse(inference_violations(config, world_size))
    return config


def checkpoint_tokenizer(source: CheckpointSource, config: RunConfig, settings: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of the checkpoint's run with the given settings.

    Raises:
        ConfigError: it cannot be built, or it is not the tokenizer that the model was trained with.
    """
    if settings:
        tokenizer = build_run_tokenizer(from_flat_dict({**to_flat_dict(config), **settings}, "command line"))
    else:
        tokenizer = source.tokenizer()
    if (conflict := source.tokenizer_conflict(tokenizer)) is not None:
        theirs, ours, remedy = conflict
        raise ConfigError(f"{source.flag}: the model was trained with {theirs}, and the tokenizer is {ours}. {remedy}.")
    return tokenizer
