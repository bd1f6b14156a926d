"""FLOPs of a step, by pass: the count of ``model/size.py``, with the passes of Selective Language Modeling."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.schema import ModelConfig
from megatron_slm.model.size import forward_flops_per_token, matrix_parameters, projection_widths
from megatron_slm.planning.layout import Layout


@dataclass(frozen=True)
class StepFlops:
    """Hold the FLOPs of a step over all ranks; ``model`` is the count that MFU refers to."""

    model: float  # forward and backward pass of the training model
    recomputation: float
    ranking: float  # additional forward pass that ranks the global batch
    reference: float  # forward pass of a co-located reference model
    filtered: float  # saved by the filtered backward pass and by the LM head's selected rows, negative

    @property
    def computed(self) -> float:
        """Return all FLOPs that devices compute."""
        return self.model + self.recomputation + self.ranking + self.reference + self.filtered


def step_flops(layout: Layout) -> StepFlops:
    """Return the FLOPs of a step."""
    config, tokens = layout.config, layout.step_tokens
    forward = forward_flops_per_token(config.model, layout.padded_vocab)
    references = (forward_flops_per_token(each.config.model, layout.padded_vocab) for each in layout.references())
    return StepFlops(
        model=3 * forward * tokens,
        recomputation=recomputed_flops_per_token(layout) * tokens,
        ranking=forward * tokens if layout.ranks_globally else 0.0,
        reference=sum(references) * tokens,
        filtered=-saved_flops_per_token(layout) * tokens,
    )


def recomputed_flops_per_token(layout: Layout) -> float:
    """Return the FLOPs per token of activations that are computed again."""
    training, model = layout.config.training, layout.config.model
    if training.recompute_granularity == "selective":
        return attention_flops_per_token(model)
    if training.recompute_granularity != "full":
        return 0.0
    layers = forward_flops_per_token(model, layout.padded_vocab) - head_flops_per_token(layout)
    if training.recompute_method == "block":
        per_rank = min((training.recompute_num_layers or 1) * layout.virtual, layout.stage_layers(0))
        return layers * per_rank * layout.pipeline / model.num_layers
    return layers


def saved_flops_per_token(layout: Layout) -> float:
    """Return the FLOPs per token that the backward pass leaves out.

    The LM head computes gradients of selected tokens only (and recomputes their logits, unless they were saved). The
    filtered backward pass does the same for the MLP, the query projection and the output projection.
    """
    unselected, model = 1 - layout.selected_share, layout.config.model
    saved = 2 * unselected * head_flops_per_token(layout)
    if layout.config.objective.slm_backward == "filtered":
        _, key = projection_widths(model)
        keys = 2 * model.hidden_size * 2 * key * model.num_layers
        saved += 2 * unselected * (2 * matrix_parameters(model) - keys)
    return saved


def head_flops_per_token(layout: Layout) -> float:
    """Return the FLOPs per token of the LM head's forward pass, MTP heads included."""
    model = layout.config.model
    return 2.0 * (1 + (model.mtp_num_layers or 0)) * model.hidden_size * layout.padded_vocab


def attention_flops_per_token(model: ModelConfig) -> float:
    """Return the FLOPs per token of the attention scores and their product with the values, over all layers."""
    query, _ = projection_widths(model)
    return 2.0 * model.seq_length * query * (model.num_layers + (model.mtp_num_layers or 0))
