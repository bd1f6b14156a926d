"""Run plan of --dry-run: sizes of the model, the run and a step, computed from the configuration."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.schema import ModelConfig, RunConfig
from megatron_slm.config.selection import selects_tokens
from megatron_slm.data.splits import estimate_training_usage
from megatron_slm.data.usage import format_usage
from megatron_slm.model.size import checkpoint_bytes, padded_vocab_size, parameter_count, training_flops_per_token
from megatron_slm.objective.selection.policy import has_own_ratios, parse_policy
from megatron_slm.runtime.files import format_size
from megatron_slm.training.free_space import kept_checkpoints
from megatron_slm.training.policy_checks import corpus_ratios, needs_reference
from megatron_slm.training.preflight import default_device, device_memory, least_memory


def print_plan(console: Console, config: RunConfig, vocab_size: int, world_size: int) -> None:
    """Print the plan of a validated run."""
    table = Table(title="plan", show_header=False)
    for row in plan(config, vocab_size, world_size):
        table.add_row(*row)
    console.print(table)
    if config.training.skip_train:
        return
    rows = estimate_training_usage(
        config.data,
        train_samples=BatchSizes.from_config(config.training).consumed_after(config.training.train_iters),
        valid_samples=config.logging.eval_iters,
        seq_length=config.model.seq_length,
    )
    if rows:
        console.print("expected data usage, from the corpus sizes:", *format_usage(rows), sep="\n", markup=False)


def plan(config: RunConfig, vocab_size: int, world_size: int) -> list[tuple[str, str]]:
    """Return the rows (quantity, value) of the run plan."""
    model, parallel, training = config.model, config.parallel, config.training
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    data = world_size // (tensor * pipeline * context)
    padded = padded_vocab_size(model, vocab_size, tensor)
    batch, length, steps = training.global_batch_size, model.seq_length, training.train_iters
    flops = training_flops_per_token(model, padded) * length
    sizes = BatchSizes.from_config(training)
    samples = sizes.consumed_after(steps)
    ramp = (
        "" if sizes.is_constant else f", from {sizes.start:,} by {sizes.increment:,} in {sizes.ramp_samples:,} samples"
    )
    settings = config.objective
    objective = f"SLM, {settings.slm_score}{_ratio(config)}" if selects_tokens(config) else "CLM"
    if config.data.slm_loss_mask is not None:
        objective += f" over the tokens of the loss mask {config.data.slm_loss_mask}"
    return [
        ("objective", objective),
        ("reference", _reference(config)),
        ("parameters", _parameters(model, vocab_size, padded)),
        ("vocabulary", f"{vocab_size:,}, padded to {padded:,}"),
        ("layout", f"TP {tensor} x PP {pipeline} x CP {context} x DP {data} = {world_size} processes"),
        ("global batch", f"{batch:,} samples = {batch * length:,} tokens{ramp}"),
        ("micro-batches per step", f"{batch // (training.micro_batch_size * data):,}"),
        ("steps", f"{steps:,} = {samples * length:,} tokens"),
        ("memory per rank", _memory(config, vocab_size)),
        ("checkpoints", _checkpoints(config, vocab_size)),
        ("training model FLOPs", f"{flops * batch:.3g} per step, {flops * samples:.3g} in total"),
    ]


def _parameters(model: ModelConfig, vocab_size: int, padded: int) -> str:
    """Return the parameter count of the model, and separately that of the padding of its vocabulary."""
    unpadded = parameter_count(model, max(vocab_size, model.vocab_size or 0))
    padding = parameter_count(model, padded) - unpadded
    return f"{unpadded:,}" + (f", and {padding:,} of the vocabulary's padding" if padding else "")


def _ratio(config: RunConfig) -> str:
    """Describe the selection ratios that are used; empty if every term of the score has one."""
    settings, corpora = config.objective, corpus_ratios(config)
    if has_own_ratios(parse_policy(settings.slm_score)):
        return ""
    ratio = f"{settings.slm_selection_ratio:g}"
    if settings.slm_selection_ratio_start is not None:
        ratio = f"{settings.slm_selection_ratio_start:g} to {ratio} ({settings.slm_selection_ratio_style})"
    if settings.slm_ratio_gain is not None:
        ratio = f"{ratio}, adapted within {settings.slm_ratio_min:g} to {settings.slm_ratio_max:g}"
    pairs = zip(settings.slm_corpus_ratios[1::2], settings.slm_corpus_ratios[0::2], strict=True)
    shares = [f"{corpus} {share}" for corpus, share in pairs]
    return ", k = " + ", ".join(shares if corpora and None not in corpora else [ratio, *shares])


def _checkpoints(config: RunConfig, vocab_size: int) -> str:
    size, kept = checkpoint_bytes(config, vocab_size), kept_checkpoints(config.checkpoint, config.training.train_iters)
    if config.checkpoint.save is None:
        return "none (no --save)"
    return f"{format_size(size)}, up to {kept:,} at the same time = {format_size(kept * size)}"


def _memory(config: RunConfig, vocab_size: int) -> str:
    needed, available = least_memory(config, vocab_size), device_memory(default_device())
    excess = ", insufficient" if needed > available else ""
    return f"at least {format_size(needed)} (this machine: {format_size(available)}{excess})"


def _reference(config: RunConfig) -> str:
    settings = config.reference
    if not needs_reference(config):
        return "none"
    names = ", ".join(settings.references)
    if settings.reference_corpora:
        names += f", by corpus ({' '.join(settings.reference_corpora)})"
    elif len(settings.references) > 1:
        names += f", combined by {settings.reference_combine}"
    if settings.reference_scores:
        return f"sidecars {names}: no forward pass of a reference model"
    if settings.reference_history is not None:
        return f"history of the training model: {settings.reference_history}"
    return names or "none"
