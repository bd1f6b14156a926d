"""Preflight checks of a run and of --dry-run: values (without torch), files, and the device.

Functions import torch locally, so that invalid flags are reported before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from megatron_slm.config.checks import resolve
from megatron_slm.config.relations.files import unwritable_outputs
from megatron_slm.config.relations.model import attention_problem
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError, refuse
from megatron_slm.runtime.files import format_size
from megatron_slm.training.policy_checks import needs_reference, score_violations

if TYPE_CHECKING:
    import torch

    from megatron_slm.tokenizers.tokenizer import Tokenizer

BYTES_PER_SAMPLE = 16  # lower bound for the sample and shuffle indices


def resolve_values(config: RunConfig, world_size: int, *, has_files: bool = True) -> RunConfig:
    """Validate all values, and return the resolved configuration of a run; see :func:`resolve`.

    Raises:
        ConfigError: lists all violations.
    """
    config = resolve(config, world_size, has_files=has_files)
    refuse(list(score_violations(config)))
    return config


def check_files(config: RunConfig, tokenizer: Tokenizer, *, verify: bool = False) -> None:
    """Validate output directories, corpora and the reference model.

    Args:
        verify: also validate score sidecars, checksums and benchmarks, which a run does when it opens them.

    Raises:
        ConfigError: a file is missing, damaged, or does not match the run.
    """
    from megatron_slm.data.datasets import check_corpora, check_loss_masks
    from megatron_slm.data.splits import check_splits
    from megatron_slm.reference.replica import check_reference
    from megatron_slm.scores.sets import verify_scores
    from megatron_slm.training.benchmarks import read_benchmarks
    from megatron_slm.training.setup import score_headers

    refuse(list(unwritable_outputs(config)))
    check_corpora(config.data, tokenizer)
    trains, length = not config.training.skip_train, config.model.seq_length
    check_loss_masks(config.data, length, verify=config.checkpoint.slm_verify_checksums)
    check_splits(config.data, valid_samples=config.logging.eval_iters, seq_length=length, trains=trains)
    if verify:
        read_benchmarks(config, tokenizer)
    if not trains:
        return
    _check_index_memory(config)
    if verify:
        headers = score_headers(config, tokenizer)
        if config.checkpoint.slm_verify_checksums:
            verify_scores(headers)
    if needs_reference(config) and config.reference.reference_load:
        check_reference(config, tokenizer, verify=verify)


def _check_index_memory(config: RunConfig) -> None:
    import psutil

    batch, memory = config.training.global_batch_size, psutil.virtual_memory().total
    for flag, steps in (("--train-iters", config.training.train_iters), ("--eval-iters", config.logging.eval_iters)):
        size = steps * batch * BYTES_PER_SAMPLE
        if size > memory:
            raise ConfigError(
                f"{flag} {steps} x --global-batch-size {batch} samples need an index of {format_size(size)}, and this "
                f"machine has {format_size(memory)}. Reduce the number of samples."
            )


def check_device(config: RunConfig, device: torch.device) -> None:
    """Validate that the device supports the configured implementations.

    Raises:
        ConfigError: an implementation is not installed, or needs a GPU.
    """
    from megatron_slm.model.gpt import check_dispatcher, choose_cross_entropy
    from megatron_slm.model.specs import choose_implementation
    from megatron_slm.runtime.process import check_backend, check_kernel_order
    from megatron_slm.training.setup import parallel_layout

    params_dtype = config.training.params_dtype
    implementation = choose_implementation(config.model.transformer_impl, device, params_dtype)
    if implementation == "transformer_engine" and (problem := attention_problem(config, params_dtype)) is not None:
        raise ConfigError(problem)
    choose_cross_entropy(config.objective.slm_cross_entropy, device)
    check_dispatcher(config.model, device)
    check_precision(config, implementation, device)
    check_diagnostics(config, device)
    check_backend(config.parallel.distributed_backend, has_gpu=device.type == "cuda")
    check_kernel_order(parallel_layout(config), device)


def slow_products(config: RunConfig, device: torch.device) -> str | None:
    """Return a warning if the matrix products of a GPU do not use its tensor cores; the setting of torch is kept."""
    import torch

    is_fp32 = config.training.params_dtype == "fp32" and torch.get_float32_matmul_precision() == "highest"
    if device.type != "cuda" or not is_fp32:
        return None
    return (
        "matrix products are in fp32, for which torch does not use the tensor cores of a GPU. Add --bf16, or set "
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 for products in TF32."
    )


def unused_speculation(config: RunConfig, vocab_size: int, device: torch.device) -> str | None:
    """Return a warning if logits are saved, so that no gradient is computed in the forward pass."""
    objective, parallel = config.objective, config.parallel
    if objective.slm_exact_mode == "recompute" or config.training.skip_train:
        return None
    from megatron_slm.model.gpt import saved_logits_bytes
    from megatron_slm.model.size import padded_vocab_size
    from megatron_slm.objective.linear_cross_entropy.chunked import LOGIT_BYTES

    ranks = parallel.tensor_model_parallel_size
    tokens = config.training.micro_batch_size * config.model.seq_length // parallel.context_parallel_size
    size = LOGIT_BYTES * tokens * padded_vocab_size(config.model, vocab_size, ranks) // ranks
    if size > saved_logits_bytes(objective, device):
        return None
    return (
        f"--slm-exact-mode {objective.slm_exact_mode} is not used: the logits of a micro-batch, {format_size(size)}, "
        "are saved. Add --slm-saved-logits-mb 0 to use it, or leave it out."
    )


def check_diagnostics(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError if a profiler needs a GPU, and there is none."""
    settings = config.diagnostics
    if settings.profile and not settings.use_pytorch_profiler and device.type != "cuda":
        raise ConfigError("--profile needs a GPU, whose kernels nsys records. Add --use-pytorch-profiler on a CPU.")
    if settings.record_memory_history and device.type != "cuda":
        raise ConfigError("--record-memory-history needs a GPU. Leave it out on a CPU.")


def device_obstacles(checks: Iterable[Callable[[], None]]) -> Iterator[str]:
    """Yield the reasons why the run cannot start on this machine, as lines for the plan."""
    for check in checks:
        try:
            check()
        except ConfigError as error:
            yield f"this machine cannot run it: {error}"


def check_precision(config: RunConfig, implementation: str, device: torch.device) -> None:
    """Validate that FP8, the optimizer and the communication overlap are available.

    Raises:
        ConfigError: one of them needs Transformer Engine, or another device.
    """
    from megatron_slm.model.fp8 import check_fp8, frozen_fp8
    from megatron_slm.model.specs import choose_implementation, engine_obstacle
    from megatron_slm.training.communication_overlap import overlap_settings

    overlap_settings(config.parallel.tp_comm_overlap_cfg)
    check_fp8(config.precision, implementation, device)
    if config.reference.reference_fp8:
        params_dtype = config.reference.reference_precision or config.training.params_dtype
        reference = choose_implementation(config.model.transformer_impl, device, params_dtype)
        check_fp8(frozen_fp8(config.precision), reference, device)
    obstacle = engine_obstacle(device)
    for flag, is_given in (
        ("--use-precision-aware-optimizer", config.precision.use_precision_aware_optimizer),
        ("--tp-comm-overlap", config.parallel.tp_comm_overlap),
    ):
        if is_given and obstacle is not None:
            raise ConfigError(f"{flag} needs Transformer Engine: {obstacle}. Install it, or leave the flag out.")


def check_memory(config: RunConfig, vocab_size: int, device: torch.device) -> None:
    """Raise ConfigError if the model cannot fit on the device, whatever the optimizer and recomputation."""
    needed, available = least_memory(config, vocab_size), device_memory(device)
    if needed > available:
        mask = mask_bytes(config)
        raise ConfigError(
            f"each rank needs at least {format_size(needed)} for weights, gradients and one layer's activations"
            f"{f', {format_size(mask)} of it for the document mask' if mask else ''}, and this "
            f"{'GPU' if device.type == 'cuda' else 'machine'} has {format_size(available)}. Use a smaller model or "
            f"--micro-batch-size, or more tensor{', context' if mask else ''} or pipeline parallelism."
        )


def default_device() -> torch.device:
    """Return the device type of a run on this machine."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_memory(device: torch.device) -> int:
    """Return the total memory of a device in bytes."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def least_memory(config: RunConfig, vocab_size: int) -> int:
    """Return a lower bound of a rank's memory in bytes: weights, gradients, one layer's activations, document mask."""
    from megatron_slm.model.size import padded_vocab_size, parameter_count

    model, parallel = config.model, config.parallel
    tensor = parallel.tensor_model_parallel_size
    padded = padded_vocab_size(model, vocab_size, tensor)
    ranks = tensor * parallel.pipeline_model_parallel_size * parallel.expert_model_parallel_size
    tokens = config.training.micro_batch_size * model.seq_length // parallel.context_parallel_size
    activations = tokens * model.hidden_size // tensor
    weights = 2 * config.training.bytes_per_value * parameter_count(model, padded) // ranks
    return weights + config.training.bytes_per_value * activations + mask_bytes(config)


def mask_bytes(config: RunConfig) -> int:
    """Return the bytes of a micro-batch's document mask: with context parallelism, one value per pair of tokens."""
    training, length, context = config.training, config.model.seq_length, config.parallel.context_parallel_size
    if context == 1 or not config.data.reset_attention_mask:
        return 0
    return training.bytes_per_value * (training.micro_batch_size * length // context) * length
