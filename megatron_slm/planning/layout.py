"""Sizes of a run that follow from its configuration and the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_slm.config.relations.wording import data_parallel_size
from megatron_slm.config.schema import ModelConfig, RunConfig
from megatron_slm.config.selection import selects_tokens
from megatron_slm.model.size import padded_vocab_size
from megatron_slm.objective.selection.policy import (
    Policy,
    largest_share,
    parse_policy,
    ranks_by_token_loss,
    selects_everything,
)
from megatron_slm.planning.devices import Device
from megatron_slm.training.policy_checks import corpus_ratios, needs_reference

VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class Layout:
    """Hold a resolved configuration with the device, the number of ranks and the vocabulary it is planned for."""

    config: RunConfig
    world_size: int
    vocab_size: int  # of the tokenizer
    device: Device
    reference_models: tuple[ModelConfig | None, ...] = ()  # of --reference-load; None: unknown, as the training model

    @property
    def tensor(self) -> int:
        """Return the degree of tensor parallelism."""
        return self.config.parallel.tensor_model_parallel_size

    @property
    def pipeline(self) -> int:
        """Return the number of pipeline stages."""
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def context(self) -> int:
        """Return the degree of context parallelism."""
        return self.config.parallel.context_parallel_size

    @cached_property
    def data(self) -> int:
        """Return the number of data-parallel ranks."""
        return data_parallel_size(self.config, self.world_size)

    @property
    def virtual(self) -> int:
        """Return the number of model chunks per pipeline rank."""
        per_chunk = self.config.parallel.num_layers_per_virtual_pipeline_stage
        return self.config.model.num_layers // self.pipeline // per_chunk if per_chunk else 1

    @cached_property
    def micro_batches(self) -> int:
        """Return the number of micro-batches per step and data-parallel rank."""
        training = self.config.training
        return training.global_batch_size // (training.micro_batch_size * self.data)

    @cached_property
    def padded_vocab(self) -> int:
        """Return the padded vocabulary size."""
        return padded_vocab_size(self.config.model, self.vocab_size, self.tensor)

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch on one rank; tensor-parallel ranks share them."""
        return self.config.training.micro_batch_size * self.config.model.seq_length // self.context

    @property
    def shard_tokens(self) -> int:
        """Return the tokens of a micro-batch between tensor-parallel regions, fewer with sequence parallelism."""
        return self.tokens // self.tensor if self.config.parallel.sequence_parallel else self.tokens

    @property
    def step_tokens(self) -> int:
        """Return the tokens of the global batch."""
        return self.config.training.global_batch_size * self.config.model.seq_length

    @property
    def value_bytes(self) -> int:
        """Return the bytes of a weight or activation."""
        return self.config.training.bytes_per_value

    @property
    def uses_engine(self) -> bool:
        """Return whether layers are Transformer Engine's: by default on a GPU, except in fp32."""
        default = "local" if self.config.training.params_dtype == "fp32" else "transformer_engine"
        return self.device.is_gpu and (self.config.model.transformer_impl or default) != "local"

    @property
    def has_replica(self) -> bool:
        """Return whether a reference model runs on the ranks of the training model."""
        return needs_reference(self.config) and self.config.reference.is_co_located

    @cached_property
    def selected_share(self) -> float:
        """Return the share of tokens that get a gradient, at most, after a curriculum; with a mix, all get one."""
        if self.policy is None or self.config.objective.slm_mix:
            return 1.0
        return max(largest_share(self.policy, ratio) for ratio in self._ratios)

    @cached_property
    def policy(self) -> Policy | None:
        """Return the selection policy, or None if all tokens are selected."""
        return parse_policy(self.config.objective.slm_score) if selects_tokens(self.config) else None

    @property
    def _ratios(self) -> list[float]:
        """Return the selection ratios of terms without one: that of the run, or those of the corpora."""
        ratio = self.config.objective.slm_selection_ratio
        return [each or ratio for each in corpus_ratios(self.config)] or [ratio]

    @property
    def ranks_globally(self) -> bool:
        """Return whether an additional forward pass ranks the global batch in every step."""
        objective = self.config.objective
        is_global = objective.slm_scope == "global-batch" and objective.slm_threshold == "exact"
        return selects_tokens(self.config) and is_global

    @property
    def computes_gradient_in_forward(self) -> bool:
        """Return whether the LM head's gradient is computed in the forward pass unless logits are saved."""
        objective, policy = self.config.objective, self.policy
        if objective.slm_mix or objective.slm_weight_temperature is not None:
            return False
        if policy is None or all(selects_everything(policy, ratio) for ratio in self._ratios):
            return True
        is_predicted = objective.slm_threshold == "predicted" and ranks_by_token_loss(policy)
        return self.ranks_globally or is_predicted or objective.slm_exact_mode == "speculative"

    @property
    def precision(self) -> str:
        """Return the precision of matrix products: fp8, or the dtype of the weights."""
        return "fp8" if self.config.precision.fp8_format is not None else self.config.training.params_dtype

    def stage_layers(self, stage: int) -> int:
        """Return the number of transformer layers on the ranks of a pipeline stage, over all its chunks."""
        parallel, layers, stages = self.config.parallel, self.config.model.num_layers, self.pipeline
        first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
        if stage == 0 and first is not None:
            return first
        if stage == stages - 1 and last is not None:
            return last
        given = [count for count in (first, last) if count is not None]
        return (layers - sum(given)) // max(stages - len(given), 1)

    def in_flight(self, stage: int) -> float:
        """Return the micro-batches whose activations a stage holds at its peak, as a share of its layers.

        The 1F1B schedule holds P - stage of them; the interleaved one holds (P - stage - 1) x 2 + (V - 1) P + 1 chunks,
        each of 1 / V of the layers (Narayanan et al., 2021; Megatron-Core's schedules).
        """
        if self.pipeline == 1:
            return 1.0
        if self.virtual == 1:
            return float(min(self.pipeline - stage, self.micro_batches))
        chunks = (self.pipeline - stage - 1) * 2 + (self.virtual - 1) * self.pipeline + 1
        return min(chunks, self.micro_batches * self.virtual) / self.virtual

    def references(self) -> list[Layout]:
        """Return the layouts of the forward passes of the co-located reference models."""
        if not self.has_replica:
            return []
        count = max(1, len(self.config.reference.reference_load))
        models = self.reference_models or (None,) * count
        return [self._reference(model or self.config.model) for model in models]

    def _reference(self, model: ModelConfig) -> Layout:
        model = replace(model, seq_length=self.config.model.seq_length)
        parallel = self.config.parallel
        if model.num_layers != self.config.model.num_layers:
            parallel = replace(
                parallel,
                decoder_first_pipeline_num_layers=None,
                decoder_last_pipeline_num_layers=None,
                num_layers_per_virtual_pipeline_stage=None,
            )
        training = self.config.training
        if self.config.reference.reference_precision is not None:
            given = self.config.reference.reference_precision
            training = replace(training, bf16=given == "bf16", fp16=given == "fp16")
        return replace(self, config=replace(self.config, model=model, parallel=parallel, training=training))
