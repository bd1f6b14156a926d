"""Reference model as a frozen replica, co-located with the training model on its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_slm.checkpoint.frozen import load_frozen_model
from megatron_slm.checkpoint.source import CheckpointSource, find_source, open_source
from megatron_slm.config.relations.model import attention_problem
from megatron_slm.config.relations.precision import unaligned_sizes
from megatron_slm.config.relations.wording import has_uneven_stages
from megatron_slm.config.schema import ParallelConfig, RunConfig
from megatron_slm.data.batches import MicroBatch
from megatron_slm.model.fp8 import frozen_fp8
from megatron_slm.model.gpt import HIGH_PRECISION, virtual_stages
from megatron_slm.model.hidden_states import HiddenStates
from megatron_slm.model.pipeline import run_pipeline
from megatron_slm.model.specs import choose_implementation
from megatron_slm.objective.tokens import ReferenceScores
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.errors import ConfigError, refuse
from megatron_slm.runtime.groups import Groups
from megatron_slm.runtime.process import preserved_random_state
from megatron_slm.tokenizers.tokenizer import Tokenizer

FLAG = "--reference-load"


class ReferenceReplica:
    """Hold a frozen reference model of any architecture and size, in the layout of the training model.

    The model is in evaluation mode, without gradients, gradient buffers or optimizer state, and is not part of the
    training model's checkpoints. Building it preserves all random states.

    With --reference-history, it has the architecture of the training model, and its weights are set by
    :class:`megatron_slm.reference.history.ModelHistory`.

    Args:
        config: configuration of the training run.
        path: checkpoint of the reference model; None: the architecture of the training model, with initial weights.
        tokenizer: tokenizer of the training run; the reference model must use the same one.
        with_entropy: also compute the entropies of the next-token distributions.

    Raises:
        ConfigError: the checkpoint is incomplete, its tokenizer, vocabulary or sequence length does not match, or the
            layout does not divide the model.
    """

    def __init__(
        self, config: RunConfig, path: str | None, tokenizer: Tokenizer, groups: Groups, *, with_entropy: bool
    ) -> None:
        step = config.reference.reference_ckpt_step
        self.with_entropy = with_entropy
        if path is None:
            self.config, load = config, _keep_weights
        else:
            source = open_source(path, step, FLAG, verify=config.checkpoint.slm_verify_checksums)
            self.config = on_first_rank(lambda: _matching_config(source, config, tokenizer))
            load = source.load_weights
        reference = self.config
        model = replace(
            reference.model,
            transformer_impl=config.model.transformer_impl,
            moe_token_dispatcher_type=config.model.moe_token_dispatcher_type,
            moe_grouped_gemm=reference.model.moe_grouped_gemm and config.model.transformer_impl != "local",
        )
        params_dtype = config.reference.reference_precision or config.training.params_dtype
        _check_attention(model.transformer_impl, config, params_dtype, groups.device)
        with preserved_random_state():
            self.chunks = load_frozen_model(
                replace(config, model=model, parallel=_layout(reference, config)),
                load,
                vocab_size=tokenizer.vocab_size,
                groups=groups,
                params_dtype=params_dtype,
                precision=frozen_fp8(config.precision) if config.reference.reference_fp8 else HIGH_PRECISION,
            )

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[ReferenceScores]:
        """Compute reference losses and optionally entropies. Collective over all ranks of the replica.

        Returns:
            one entry per micro-batch on the last pipeline stage, an empty list on other stages.
        """
        with torch.no_grad():
            return run_pipeline(self.chunks, micro_batches, self._scores, forward_only=True)

    def token_scores(self, batch: MicroBatch, hidden: HiddenStates) -> ReferenceScores:
        """Return the scores of a micro-batch from its final hidden states."""
        losses = hidden.token_losses(batch.labels, with_entropy=self.with_entropy)
        return ReferenceScores(losses.loss, losses.entropy)

    def _scores(self, number: int, batch: MicroBatch, hidden: HiddenStates) -> tuple[Tensor, Tensor, ReferenceScores]:
        scores = self.token_scores(batch, hidden)
        return scores.loss.sum(), batch.loss_mask.sum(), scores


def _keep_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Keep the initial weights of a model."""


def check_reference(config: RunConfig, tokenizer: Tokenizer, *, verify: bool = False) -> None:
    """Validate the checkpoints of the reference models. Not collective.

    Args:
        verify: also read the metadata and compare files with their checksums, as a run does on loading.

    Raises:
        ConfigError: a checkpoint is missing or incomplete, or a model does not match the run.
    """
    for path in config.reference.reference_load:
        source = find_source(path, config.reference.reference_ckpt_step, FLAG)
        if verify:
            source.verify(checksums=config.checkpoint.slm_verify_checksums)
        else:
            source.check()
        _matching_config(source, config, tokenizer)


def _matching_config(source: CheckpointSource, config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Return the reference model's configuration after comparing it with the run's."""
    name = f"{FLAG} {source.directory}"
    if (conflict := source.tokenizer_conflict(tokenizer)) is not None:
        theirs, ours, remedy = conflict
        raise ConfigError(
            f"{name}: the reference model was trained with {theirs}, and the training model has {ours}. {remedy} for "
            "both models."
        )
    source.check_fits(config)
    reference = source.config()
    _check_shape(reference, config, name)
    return reference


def _layout(reference: RunConfig, config: RunConfig) -> ParallelConfig:
    """Return the reference model's layout: the training model's, with an even split if layer counts differ."""
    parallel = config.parallel
    if reference.model.num_layers == config.model.num_layers:
        return parallel
    stages = virtual_stages(config.model, parallel)
    layers = reference.model.num_layers // (parallel.pipeline_model_parallel_size * (stages or 1))
    return replace(
        parallel,
        num_layers_per_virtual_pipeline_stage=layers if stages else None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
    )


def _check_attention(requested: str | None, config: RunConfig, params_dtype: str, device: torch.device) -> None:
    """Raise ConfigError if Transformer Engine's attention, if it is used, cannot isolate the documents of the run."""
    implementation = choose_implementation(requested, device, params_dtype)
    if implementation == "transformer_engine" and (problem := attention_problem(config, params_dtype)) is not None:
        raise ConfigError(f"{FLAG}: {problem}")


def _check_shape(reference: RunConfig, config: RunConfig, name: str) -> None:
    """Raise ConfigError if the model called ``name`` does not match the run's sequence length, FP8 or layout."""
    model, length, longest = reference.model, config.model.seq_length, reference.model.seq_length
    if length > longest:
        raise ConfigError(
            f"{name}: the reference model was trained with --seq-length {longest}, and this run has {length}. Train "
            f"the reference model with at least {length}, or this run with at most {longest}."
        )
    if config.reference.reference_fp8:
        recipe = config.precision.fp8_recipe
        refuse(
            list(
                unaligned_sizes(
                    replace(model, seq_length=length),
                    config.parallel,
                    config.training,
                    recipe,
                    f"{name} with --reference-fp8",
                )
            )
        )
    parallel, tensor = config.parallel, config.parallel.tensor_model_parallel_size
    stages = parallel.pipeline_model_parallel_size * (virtual_stages(config.model, parallel) or 1)
    groups = model.num_query_groups if model.group_query_attention else model.num_attention_heads
    for unit, size, divisor, flag in (
        ("layers", model.num_layers, stages, "--pipeline-model-parallel-size x virtual stages"),
        ("key/value heads", groups, tensor, "--tensor-model-parallel-size"),
        ("MLP channels", model.ffn_hidden_size, tensor, "--tensor-model-parallel-size"),
        ("experts", model.num_experts, parallel.expert_model_parallel_size, "--expert-model-parallel-size"),
    ):
        if unit == "layers" and size == config.model.num_layers and has_uneven_stages(parallel):
            continue  # split like the training model's
        if unit == "key/value heads" and tensor % (size or 1) == 0:
            continue  # shared by several ranks
        if (size or 0) % divisor:
            raise ConfigError(
                f"{name}: the reference model has {size} {unit}, which {flag} = {divisor} does not divide. "
                "The reference model uses the layout of the training model; choose another layout or reference model."
            )
