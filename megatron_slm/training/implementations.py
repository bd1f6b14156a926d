"""Implementations of the parts of a run, found by inspection of its objects; the requirement of the fastest ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer, is_float8tensor
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_slm.mcore.gradient_fusion import apex_is_available
from megatron_slm.mcore.optimizer import optimizer_parts
from megatron_slm.model.gpt import model_config
from megatron_slm.model.hidden_states import LMHead
from megatron_slm.model.specs import IN_FP32, local_reason
from megatron_slm.runtime.collective import gather_on_first_rank, on_first_rank
from megatron_slm.training.expected_implementations import FILTERED, refuse_fallbacks
from megatron_slm.training.state import TrainState

ENGINE = ("megatron.core.extensions.transformer_engine", "transformer_engine")  # packages of Transformer Engine's parts
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
CPU_CHOICES = ("lm-head", "reference", "grad-reduce", "param-gather", "p2p-comm")  # parts with several implementations
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Implementation:
    """Represent the implementation of one part of a run."""

    part: str  # name for --require-fused
    used: str
    obstacle: str = ""  # reason why the fastest implementation is not used; empty if it is


def inspect_run(state: TrainState, reference: Sequence[torch.nn.Module], *, has_sidecar: bool) -> list[Implementation]:
    """Return the implementations on this rank.

    Args:
        state: model and optimizer of the run.
        reference: chunks of the reference models that run.
        has_sidecar: reference losses come from sidecars.
    """
    chunks = state.model_chunks
    config = model_config(list(chunks))
    layers = [layer for chunk in chunks for layer in chunk.modules() if isinstance(layer, TransformerLayer)]
    local = local_reason(state.groups.device, NAMES[config.params_dtype])
    linear = [module for layer in layers for name, module in layer.named_modules() if name.endswith(LINEAR)]
    return [
        _linear(linear, local),
        *_attention_and_norms(chunks, layers, config, local),
        _rotary(chunks, config, local),
        _weight_gradients(linear, local, state.groups.device),
        _optimizer(state, local),
        *_lm_head(chunks),
        _fp8(config, linear),
        _reference(reference, has_sidecar),
        *_overlaps(chunks, config, state),
    ]


def _is_engine(module: Any) -> bool:
    return type(module).__module__.startswith(ENGINE)


def _is_filtered(modules: Sequence[Any]) -> bool:
    return any("filtered_backward" in type(module).__module__ for module in modules)


def _classes(modules: Sequence[Any]) -> str:
    return ", ".join(sorted({type(module).__name__ for module in modules})) or "none on this rank"


def _linear(modules: Sequence[torch.nn.Module], local: str) -> Implementation:
    if all(map(_is_engine, modules)):
        return Implementation("linear", f"Transformer Engine ({_classes(modules)})")
    obstacle = FILTERED if _is_filtered(modules) else local
    return Implementation("linear", f"torch ({_classes(modules)})", obstacle)


def _attention_and_norms(
    chunks: Sequence[torch.nn.Module], layers: Sequence[TransformerLayer], config: TransformerConfig, local: str
) -> Iterator[Implementation]:
    attention = [layer.self_attention.core_attention for layer in layers]
    if all(map(_is_engine, attention)) and config.params_dtype is torch.float32:
        yield Implementation("attention", "Transformer Engine (not fused)", IN_FP32)
    elif all(map(_is_engine, attention)):
        yield Implementation("attention", "Transformer Engine (FlashAttention or cuDNN, by call)")
    else:
        yield Implementation("attention", "torch scaled_dot_product_attention", local)
    kinds = (torch.nn.LayerNorm, torch.nn.RMSNorm)
    norms = [module for chunk in chunks for module in chunk.modules() if isinstance(module, kinds)]
    if norms:
        yield Implementation("norm", f"torch ({_classes(norms)})", local)
    else:
        yield Implementation("norm", "Transformer Engine")


def _rotary(chunks: Sequence[torch.nn.Module], config: TransformerConfig, local: str) -> Implementation:
    rotary = [module for chunk in chunks for name, module in chunk.named_modules() if name.endswith("rotary_pos_emb")]
    if not rotary:
        return Implementation("rope", "no rotary embeddings")
    if config.apply_rope_fusion:
        return Implementation("rope", "Transformer Engine")
    has_ids = any(type(module).__name__ == "RotaryByPosition" for module in rotary)
    return Implementation("rope", "torch", "--reset-position-ids" if has_ids else local)


def _weight_gradients(modules: Sequence[torch.nn.Module], local: str, device: torch.device) -> Implementation:
    """Return how weight gradients are added to the gradient buffer."""
    fuses = ("fuse_wgrad_accumulation", "gradient_accumulation_fusion")
    if all(any(getattr(module, name, False) for name in fuses) for module in modules):
        return Implementation("weight-gradient", "added to the gradient buffer by the matrix product")
    separate, flag = "separate addition", "--no-gradient-accumulation-fusion"
    if all(map(_is_engine, modules)):
        return Implementation("weight-gradient", separate, flag)
    if _is_filtered(modules):
        return Implementation("weight-gradient", separate, FILTERED)
    reason = "NVIDIA apex's extension is not installed"
    if apex_is_available:
        reason = flag if device.type == "cuda" else ""
    return Implementation("weight-gradient", separate, "; ".join(filter(None, (local, reason))))


def _optimizer(state: TrainState, local: str) -> Implementation:
    found = [part.optimizer for part in optimizer_parts(state.optimizer) if part.optimizer is not None]
    inner, package = found[0], type(found[0]).__module__.partition(".")[0]
    name = {"transformer_engine": "Transformer Engine", "apex": "NVIDIA apex"}.get(package, package)
    used = f"{name} {type(inner).__name__}"
    if package != "torch":
        return Implementation("adam", used)
    if all(group.get("fused") for group in inner.param_groups):
        return Implementation("adam", f"{used} (fused)")
    apex = "" if importlib.util.find_spec("amp_C") else "; NVIDIA apex's extensions are not installed"
    return Implementation("adam", used, f"{local}{apex}")


def _lm_head(chunks: Sequence[torch.nn.Module]) -> Iterator[Implementation]:
    """Yield the implementation of the LM head on the last pipeline stage."""
    heads = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LMHead)]
    if not heads:
        return
    used = heads[0].settings.implementation
    reason = "" if used == "triton" else f"--slm-cross-entropy {used}, the default without a GPU and Triton"
    yield Implementation("lm-head", f"{used} linear cross-entropy", reason)


def _fp8(config: TransformerConfig, linear: Sequence[torch.nn.Module]) -> Implementation:
    if not config.fp8:
        return Implementation("fp8", "off", "--fp8-format is not given")
    number = config.num_layers
    high = sum(is_first_last_bf16_layer(config, layer) for layer in range(number))
    stored = "FP8" if config.fp8_param else "bf16"  # this rank may have layers in bf16 only
    used = f"{config.fp8_recipe}, {config.fp8}, {number - high} of {number} layers, weights in {stored}"
    return Implementation("fp8", used, "" if all(map(_is_engine, linear)) else "linear layers are not in FP8")


def _reference(chunks: Sequence[torch.nn.Module], has_sidecar: bool) -> Implementation:
    if not chunks:
        return Implementation("reference", "sidecar" if has_sidecar else "none")
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    dtypes = sorted({NAMES.get(parameter.dtype, str(parameter.dtype)) for parameter in parameters})
    if any(map(is_float8tensor, parameters)):
        return Implementation("reference", f"weights of linear layers in FP8, others in {', '.join(dtypes)}")
    return Implementation("reference", f"weights in {', '.join(dtypes)}", "--reference-fp8 is not given")


def _overlaps(
    chunks: Sequence[torch.nn.Module], config: TransformerConfig, state: TrainState
) -> Iterator[Implementation]:
    """Yield the overlap of communication with computation, as far as there is communication."""
    ddp: Any = chunks[0].ddp_config
    groups, is_interleaved = state.groups, config.virtual_pipeline_model_parallel_size is not None
    schedule = "--no-overlap-p2p-communication" if is_interleaved else "no interleaved schedule"
    for part, obstacle, ranks, overlaps in (
        ("grad-reduce", "no --overlap-grad-reduce", groups.dp_cp.size(), ddp.overlap_grad_reduce),
        ("param-gather", "no --overlap-param-gather", groups.dp_cp.size(), ddp.overlap_param_gather),
        ("tp-comm", "no --tp-comm-overlap", groups.tp_size, config.tp_comm_overlap),
        ("p2p-comm", schedule, groups.pp_size, config.overlap_p2p_comm),
    ):
        if part == "param-gather" and not ddp.use_distributed_optimizer:
            yield Implementation(part, "none: no distributed optimizer")
        elif ranks == 1:
            yield Implementation(part, "none: one rank")
        else:
            yield Implementation(part, "overlapped" if overlaps else "not overlapped", "" if overlaps else obstacle)


def report_implementations(
    here: Sequence[Implementation], required: Sequence[str], device: torch.device, console: Console
) -> None:
    """Print the implementations of all ranks as a table. Collective over all ranks.

    Args:
        here: result of :func:`inspect_run` on this rank.
        required: parts of --require-fused.
        device: device of the run.
        console: console of the run.

    Raises:
        ConfigError: a required part does not use its fastest implementation; on every rank.
    """
    gathered = gather_on_first_rank(list(here))

    def report() -> None:
        found = merge_ranks(gathered)
        table = Table(title="implementations", box=None, pad_edge=False)
        table.add_column("part", no_wrap=True)
        table.add_column("implementation", no_wrap=True)
        table.add_column("obstacle to the fastest")
        for each in found if device.type == "cuda" else _shown_on_cpus(found, required):
            table.add_row(each.part, escape(each.used), escape(each.obstacle))
        console.print(table)
        refuse_fallbacks({each.part: f"{each.used} ({each.obstacle})" for each in found if each.obstacle}, required)

    on_first_rank(report)


def _shown_on_cpus(found: Sequence[Implementation], required: Sequence[str]) -> Iterator[Implementation]:
    """Yield the parts whose implementation is a choice without a GPU, and required ones."""
    for each in found:
        is_choice = each.part in CPU_CHOICES and not each.used.startswith("none")
        if is_choice or each.part in required or FILTERED in each.obstacle:
            yield each


def merge_ranks(ranks: Sequence[Sequence[Implementation]]) -> list[Implementation]:
    """Return one implementation per part: the first with an obstacle on any rank, else the first."""
    found: dict[str, Implementation] = {}
    for each in (each for rank in ranks for each in rank):
        known = found.setdefault(each.part, each)
        if each.obstacle and not known.obstacle:
            found[each.part] = each
    return list(found.values())
