"""Time, memory and FLOPs of the LM head's loss, forward and backward, side by side: others' ways and ours.

    python tools/benchmark_objective.py --sizes quickstart 1B --tokens 512 --output objective.json

The job is one micro-batch of SLM at the selection ratio: token losses, exact selection by excess loss, gradients of
hidden states and weight. Ways that cannot select (their backward pass is done in their forward pass) train on all
tokens. Ways that are not installed, or need a GPU, are skipped with the reason. Times are medians of repeats that
take turns. Memory is the peak of a process of its own, without inputs and gradients. The matrix limit is the time
that the way's FLOPs take as plain matrix products in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_slm.objective.early_rule import ThresholdGuess
from megatron_slm.objective.linear_cross_entropy.early import EarlySelection
from megatron_slm.objective.linear_cross_entropy.head import LMHead
from megatron_slm.objective.linear_cross_entropy.token_loss import linear_cross_entropy
from megatron_slm.objective.threshold import select_highest
from megatron_slm.runtime.console import progress

SIZES = {  # tokens N, hidden size H, vocabulary V
    "quickstart": (2048, 160, 4096),
    "1B": (2048, 2048, 32000),
    "7B": (4096, 4096, 32000),
    "llama3-8B": (4096, 4096, 128256),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Unavailable(Exception):
    """Why a way cannot be measured here."""


@dataclass
class Problem:
    """One micro-batch before the LM head."""

    hidden: Tensor  # [N, 1, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N, 1]
    reference_loss: Tensor  # [1, N]
    ratio: float
    threshold: float = 0.0  # the exact one
    guess: Tensor | None = None  # from micro-batches like this one

    @classmethod
    def make(cls, shape: tuple[int, int, int], ratio: float, device: str, dtype: torch.dtype) -> Problem:
        """Random, with logits of unit scale and reference losses that scatter as much as token losses."""
        tokens, width, entries = shape
        torch.manual_seed(1)
        problem = cls(
            torch.randn(tokens, 1, width, device=device, dtype=dtype).requires_grad_(),
            (torch.randn(entries, width, device=device) * width**-0.5).to(dtype).requires_grad_(),
            torch.randint(0, entries, (tokens, 1), device=device),
            torch.randn(1, tokens, device=device),
            ratio,
        )
        problem._foresee()
        return problem

    def _foresee(self) -> None:
        """Its threshold, and a guess from micro-batches with other labels, as training would have it."""
        guess, labels = ThresholdGuess(), self.labels
        with torch.no_grad():
            for _ in range(4):
                self.labels = torch.randint_like(labels, self.weight.size(0))
                guess.observe(self.select(self._losses())[1])
            self.labels = labels
            self.threshold = float(self.select(self._losses())[1])
        self.guess = guess.sure()

    def _losses(self) -> Tensor:
        return linear_cross_entropy(self.hidden, self.weight, self.labels, LMHead()).loss

    def select(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Selected tokens [N, 1] fp32 and the threshold, from token losses [N, 1]."""
        score = (loss.detach().t() - self.reference_loss).float()
        order = torch.arange(score.size(1), device=score.device)[None]
        count = torch.full((1,), -int(-self.ratio * score.size(1) // 1), device=score.device)
        selected, threshold = select_highest(score, torch.ones_like(score, dtype=torch.bool), count, order, None)
        return selected.t().float(), threshold[0]

    def selective_backward(self, loss: Tensor) -> None:
        """Select among token losses [N, 1] and go backward for what is selected."""
        (loss * self.select(loss)[0]).sum().backward()

    def flat(self) -> tuple[Tensor, Tensor]:
        return self.hidden.flatten(0, 1), self.labels.flatten()


def _standard(problem: Problem) -> None:
    hidden, labels = problem.flat()
    loss = F.cross_entropy(F.linear(hidden, problem.weight).float(), labels, reduction="none")
    problem.selective_backward(loss[:, None])


def make_standard(problem: Problem) -> Callable[[], None]:
    return partial(_standard, problem)


def make_compiled(problem: Problem) -> Callable[[], None]:
    def token_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

    compiled = torch.compile(token_loss)
    hidden, labels = problem.flat()
    return lambda: problem.selective_backward(compiled(hidden, problem.weight, labels)[:, None])


def make_megatron(problem: Problem) -> Callable[[], None]:
    import torch.distributed as dist
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    if not dist.is_initialized():
        backend = "nccl" if problem.hidden.is_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD

    def run() -> None:
        logits = F.linear(problem.hidden, problem.weight)
        problem.selective_backward(fused_vocab_parallel_cross_entropy(logits, problem.labels, group))

    return run


def make_liger(problem: Problem) -> Callable[[], None]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    _needs_gpu(problem)
    hidden, labels = problem.flat()
    return lambda: liger_fused_linear_cross_entropy(hidden, problem.weight, labels, reduction="sum").backward()


def make_cut(problem: Problem, impl: str) -> Callable[[], None]:
    from cut_cross_entropy import linear_cross_entropy as cut

    if impl == "cce":
        _needs_gpu(problem)
    hidden, labels = problem.flat()
    return lambda: problem.selective_backward(cut(hidden, problem.weight, labels, reduction="none", impl=impl)[:, None])


def make_quack(problem: Problem) -> Callable[[], None]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _needs_gpu(problem)
    hidden, labels = problem.flat()
    return lambda: chunked_linear_cross_entropy(hidden, problem.weight, labels, reduction="sum").backward()


def _needs_gpu(problem: Problem) -> None:
    if not problem.hidden.is_cuda:
        raise Unavailable("needs a GPU")


def make_ours(
    problem: Problem, *, early: str = "", engine: str | None = None, kept: bool = False
) -> Callable[[], None]:
    engine = engine or ("triton" if problem.hidden.is_cuda else "chunked")
    head = LMHead(engine=engine, kept_bytes=1 << 40 if kept else 0)
    valid = torch.ones_like(problem.reference_loss, dtype=torch.bool)
    rules = {
        "": None,
        "all": EarlySelection(valid),
        "carried": EarlySelection(valid, problem.threshold, problem.reference_loss),
        "speculative": EarlySelection(
            valid, problem.guess if problem.guess is not None else 0.0, problem.reference_loss
        ),
    }

    def run() -> None:
        loss = linear_cross_entropy(problem.hidden, problem.weight, problem.labels, head, early=rules[early]).loss
        if early == "all":
            loss.sum().backward()
        elif early == "carried":
            (loss * (loss.detach() - problem.reference_loss.t() >= problem.threshold)).sum().backward()
        else:
            problem.selective_backward(loss)

    return run


@dataclass(frozen=True)
class Way:
    """A way to compute the loss: how to make it, and its FLOPs in units of NHV for a ratio k (None: not counted)."""

    make: Callable[[Problem], Callable[[], None]]
    flops: Callable[[float], float]
    is_ours: bool = False


WAYS = {
    "standard": Way(make_standard, lambda k: 6),
    "torch.compile": Way(make_compiled, lambda k: 6),
    "megatron fused": Way(make_megatron, lambda k: 6),
    "liger (all tokens)": Way(make_liger, lambda k: 6),
    "cut-cross-entropy": Way(partial(make_cut, impl="cce"), lambda k: 8),
    "cut-cross-entropy, torch.compile": Way(partial(make_cut, impl="torch_compile"), lambda k: 6),
    "quack (all tokens)": Way(make_quack, lambda k: 6),
    "ours, torch": Way(partial(make_ours, engine="torch"), lambda k: 6, True),
    "ours, all tokens": Way(partial(make_ours, early="all"), lambda k: 6, True),
    "ours, recompute": Way(make_ours, lambda k: 2 + 6 * k, True),
    "ours, speculative": Way(partial(make_ours, early="speculative"), lambda k: 2 + 4 * k, True),
    "ours, kept logits": Way(partial(make_ours, kept=True), lambda k: 2 + 4 * k, True),
    "ours, carried": Way(partial(make_ours, early="carried"), lambda k: 2 + 4 * k, True),
}


def prepare(way: str, problem: Problem) -> Callable[[], None]:
    """The way, ready to be measured: built and run once.

    Raises:
        Unavailable: not installed, or not able to run here.
    """
    try:
        run = WAYS[way].make(problem)
        step(run, problem)
    except Unavailable:
        raise
    except ImportError as error:
        raise Unavailable(f"not installed ({error.name})") from error
    except Exception as error:  # a peer that fails is a line of the table, not the end of the run
        raise Unavailable(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}") from error
    return run


def step(run: Callable[[], None], problem: Problem) -> float:
    """Seconds of one forward and backward pass, from no gradients."""
    problem.hidden.grad = problem.weight.grad = None
    _synchronize(problem)
    began = time.perf_counter()
    run()
    _synchronize(problem)
    return time.perf_counter() - began


def _synchronize(problem: Problem) -> None:
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()


def matrix_seconds(problem: Problem, repeats: int) -> float:
    """Seconds of the 2NHV of one plain matrix product, the mean of the three kinds that a head needs."""
    hidden, weight = problem.hidden.detach().flatten(0, 1), problem.weight.detach()
    logits = hidden @ weight.t()
    products = (lambda: hidden @ weight.t(), lambda: logits @ weight, lambda: logits.t() @ hidden)

    def run() -> None:
        for product in products:
            product()

    return statistics.median(step(run, problem) for _ in range(repeats + 1)) / 3


def measure_times(ways: Sequence[str], problem: Problem, repeats: int, name: str) -> dict[str, Any]:
    """Seconds of each way (or why there are none), each repeat of all ways in turn; and of a matrix product."""
    ready: dict[str, Callable[[], None]] = {}
    results: dict[str, Any] = {}
    for way in ways:
        try:
            ready[way] = prepare(way, problem)
        except Unavailable as reason:
            results[way] = {"skipped": str(reason)}
    seconds: dict[str, list[float]] = {way: [] for way in ready}
    with progress(f"timing {name}", repeats * len(ready), "runs") as bar:
        for _ in range(repeats):
            for way, run in ready.items():
                seconds[way].append(step(run, problem))
                bar.advance()
    for way, values in seconds.items():
        results[way] = {"seconds": statistics.median(values), "fastest": min(values), "slowest": max(values)}
    return {"ways": results, "matrix_seconds": matrix_seconds(problem, repeats)}


def peak_bytes(way: str, problem: Problem) -> int:
    """Most memory of one run above what was there before, without the gradients. For a process of its own."""
    run = prepare(way, problem)
    problem.hidden.grad = problem.weight.grad = None
    gradients = sum(value.numel() * value.element_size() for value in (problem.hidden, problem.weight))
    if problem.hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before - gradients
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before - gradients


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(way: str, size: str, arguments: argparse.Namespace) -> int | str:
    """The peak of ``way`` in a fresh process, in bytes, or what went wrong."""
    command = [sys.executable, __file__, "--memory-of", way, "--sizes", size, "--dtype", arguments.dtype]
    command += ["--device", arguments.device, "--ratio", str(arguments.ratio), "--threads", str(arguments.threads)]
    if arguments.tokens:
        command += ["--tokens", str(arguments.tokens)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back, so that peaks are seen
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    return int(last) if done.returncode == 0 and last.lstrip("-").isdigit() else done.stderr.strip()[-200:]


def shape_of(size: str, arguments: argparse.Namespace) -> tuple[int, int, int]:
    tokens, width, entries = SIZES[size]
    return arguments.tokens or tokens, width, entries


def measure(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one size."""
    shape = shape_of(size, arguments)
    problem = Problem.make(shape, arguments.ratio, arguments.device, DTYPES[arguments.dtype])
    result = measure_times(arguments.ways, problem, arguments.repeats, size)
    measured = [way for way, figures in result["ways"].items() if "seconds" in figures]
    del problem
    with progress(f"memory of {size}", len(measured), "ways") as bar:
        for way in measured if arguments.memory else []:
            result["ways"][way]["peak_bytes"] = measure_memory(way, size, arguments)
            bar.advance()
    best = min((result["ways"][way]["seconds"] for way in measured if not WAYS[way].is_ours), default=None)
    logits = shape[0] * shape[2] * DTYPES[arguments.dtype].itemsize
    for way in measured:
        figures = result["ways"][way]
        flops = WAYS[way].flops(arguments.ratio)
        figures["flops_in_nhv"] = flops
        figures["of_matrix_limit"] = figures["seconds"] / (flops / 2 * result["matrix_seconds"])
        figures["of_best_peer"] = figures["seconds"] / best if best else None
        if isinstance(figures.get("peak_bytes"), int):
            figures["peak_of_logits"] = figures["peak_bytes"] / logits
    return {"size": size, "shape": shape, **result}


def print_table(console: Console, result: dict[str, Any]) -> None:
    tokens, width, entries = result["shape"]
    table = Table(title=f"{result['size']}: N = {tokens}, H = {width}, V = {entries}")
    for column in ("way", "FLOPs / NHV", "ms", "of best peer", "of matrix limit", "peak MiB", "of logits"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, figures in result["ways"].items():
        if "skipped" in figures:
            table.add_row(way, figures["skipped"])
            continue
        peak = figures.get("peak_bytes")
        table.add_row(
            way,
            f"{figures['flops_in_nhv']:.1f}",
            f"{figures['seconds'] * 1e3:.1f}",
            f"{figures['of_best_peer']:.2f}" if figures["of_best_peer"] else "",
            f"{figures['of_matrix_limit']:.2f}",
            f"{peak / 2**20:.1f}" if isinstance(peak, int) else str(peak or ""),
            f"{figures['peak_of_logits']:.3f}" if "peak_of_logits" in figures else "",
        )
    console.print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--tokens", type=int, help="tokens N instead of the size's own")
    parser.add_argument("--ratio", type=float, default=0.6, help="selection ratio k [0.6]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bf16 on a GPU, else fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch on the CPU")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory too")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # how this script measures memory in its own processes
    arguments = parser.parse_args(argv)
    arguments.dtype = arguments.dtype or ("bf16" if arguments.device.startswith("cuda") else "fp32")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        from megatron_slm.runtime.cpu import redirect_cuda_to_cpu

        redirect_cuda_to_cpu()
    if arguments.memory_of:
        shape = shape_of(arguments.sizes[0], arguments)
        problem = Problem.make(shape, arguments.ratio, arguments.device, DTYPES[arguments.dtype])
        print(peak_bytes(arguments.memory_of, problem))
        return 0
    console = Console()
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "CPU"
    facts = {"device": device, "torch": torch.__version__, "dtype": arguments.dtype, "threads": arguments.threads}
    facts |= {"ratio": arguments.ratio, "repeats": arguments.repeats}
    console.print(facts)
    results = []
    for size in arguments.sizes:
        results.append(measure(size, arguments))
        print_table(console, results[-1])
        if arguments.output:
            text = json.dumps({**facts, "sizes": results}, indent=1)
            arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
