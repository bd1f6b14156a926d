"""The reference model as a frozen pipeline replica on the training model's own ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.checkpoint.weights import check_metadata, find_checkpoint, load_weights, open_checkpoint
from megatron_slm.config.checkpoint_files import read_manifest, saved_config
from megatron_slm.config.relations.wording import has_uneven_stages
from megatron_slm.config.schema import Config, ParallelConfig
from megatron_slm.data.batches import MicroBatch
from megatron_slm.model.gpt import build_model, virtual_stages
from megatron_slm.model.hidden_states import HiddenStates
from megatron_slm.model.pipeline import run_pipeline
from megatron_slm.objective.tokens import ReferenceScores
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import Groups
from megatron_slm.runtime.process import preserved_random_state
from megatron_slm.tokenizers.identity import identity_conflict
from megatron_slm.tokenizers.tokenizer import Tokenizer

FLAG = "--reference-load"


class ReferenceReplica:
    """A reference model of its own architecture and size, in the layout of the training model.

    It never trains: evaluation mode, no gradients, no gradient buffers, no optimizer state, and it is in no
    checkpoint of the training model. Building it leaves all random states as they were.

    Args:
        config: of the run that trains; its reference flags say where the checkpoint is.
        tokenizer: of the run that trains; the reference model must have been made with the same.
        with_entropy: also report the entropies of the next-token distributions.

    Raises:
        ConfigError: no whole checkpoint, another tokenizer or vocabulary, a shorter sequence length, or a size that
            the layout does not divide.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, groups: Groups, *, with_entropy: bool) -> None:
        path, step = config.reference.reference_load, config.reference.reference_ckpt_step
        assert path is not None, "checked by config.checks"
        directory = open_checkpoint(path, step, FLAG, verify=config.checkpoint.slm_verify_checksums)
        check_metadata(directory, FLAG)
        self.config = own = on_first_rank(lambda: _fitting_config(directory, config, tokenizer))
        precision = config.reference.reference_precision
        self.with_entropy = with_entropy
        with preserved_random_state():
            self.chunks = build_model(
                replace(own.model, transformer_impl=config.model.transformer_impl, mtp_num_layers=None),
                vocab_size=tokenizer.vocab_size,
                parallel=_layout(own, config),
                training=replace(config.training, recompute_granularity=None),
                objective=config.objective,
                groups=groups,
                bf16=config.training.bf16 if precision is None else precision == "bf16",
                resets_positions=config.data.reset_position_ids,
            )
        load_weights(self.chunks, directory, FLAG)
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[ReferenceScores]:
        """Reference losses (and entropies) of every token: one entry per micro-batch on the last pipeline stage,
        where the selection happens; nothing on the other stages. Collective over all ranks of the replica."""
        with torch.no_grad():
            return run_pipeline(self.chunks, micro_batches, self._scores, forward_only=True)

    def _scores(self, number: int, batch: MicroBatch, hidden: HiddenStates) -> tuple[Tensor, Tensor, ReferenceScores]:
        loss, entropy = hidden.token_losses(batch.labels, with_entropy=self.with_entropy)
        return loss.sum(), batch.loss_mask.sum(), ReferenceScores(loss, entropy)


def check_reference(config: Config, tokenizer: Tokenizer, *, verify: bool = False) -> None:
    """Check the reference model's checkpoint. On this rank alone.

    Args:
        verify: read its metadata and compare its files with their checksums, too; a run does so when it loads them.

    Raises:
        ConfigError: the checkpoint is missing or incomplete, or the model does not fit the run.
    """
    path = config.reference.reference_load
    assert path is not None, "checked by config.checks"
    find = partial(open_checkpoint, verify=config.checkpoint.slm_verify_checksums) if verify else find_checkpoint
    directory = find(path, config.reference.reference_ckpt_step, FLAG)
    _fitting_config(directory, config, tokenizer)
    if verify:
        check_metadata(directory, FLAG)


def _fitting_config(directory: Path, config: Config, tokenizer: Tokenizer) -> Config:
    """Return the configuration of the reference model, checked against the run's."""
    _check_tokenizer(read_manifest(directory, FLAG).tokenizer, tokenizer)
    reference = saved_config(directory)
    _check_shape(reference, config)
    return reference


def _check_tokenizer(recorded: dict[str, object], tokenizer: Tokenizer) -> None:
    if (conflict := identity_conflict(recorded, tokenizer)) is not None:
        theirs, ours, remedy = conflict
        raise ConfigError(
            f"{FLAG}: the reference model was trained with {theirs}, and the training model has {ours}. {remedy} for "
            "both models."
        )


def _layout(own: Config, config: Config) -> ParallelConfig:
    """Return the layout of the reference model: that of the training model, with its layers split evenly if it has
    another number of layers."""
    parallel = config.parallel
    if own.model.num_layers == config.model.num_layers:
        return parallel
    stages = virtual_stages(config.model, parallel)
    layers = own.model.num_layers // (parallel.pipeline_model_parallel_size * (stages or 1))
    return replace(
        parallel,
        num_layers_per_virtual_pipeline_stage=layers if stages else None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
    )


def _check_shape(own: Config, config: Config) -> None:
    length, longest = config.model.seq_length, own.model.seq_length
    if length > longest:
        raise ConfigError(
            f"{FLAG}: the reference model was trained with --seq-length {longest}, and this run has {length}. Train "
            f"the reference model with at least {length}, or this run with at most {longest}."
        )
    parallel, tensor = config.parallel, config.parallel.tensor_model_parallel_size
    stages = parallel.pipeline_model_parallel_size * (virtual_stages(config.model, parallel) or 1)
    groups = own.model.num_query_groups if own.model.group_query_attention else own.model.num_attention_heads
    for what, size, divisor, flag in (
        ("layers", own.model.num_layers, stages, "--pipeline-model-parallel-size x virtual stages"),
        ("key/value heads", groups, tensor, "--tensor-model-parallel-size"),
        ("MLP channels", own.model.ffn_hidden_size, tensor, "--tensor-model-parallel-size"),
    ):
        if what == "layers" and size == config.model.num_layers and has_uneven_stages(parallel):
            continue  # split as the training model's
        if (size or 0) % divisor:
            raise ConfigError(
                f"{FLAG}: the reference model has {size} {what}, which {flag} = {divisor} does not divide. "
                "The reference model runs in the layout of the training model."
            )
