"""Time, memory and FLOPs of the LM head's loss, forward and backward, side by side: others' ways and ours.

    python benchmarks/benchmark_objective.py --sizes quickstart 1B --tokens 512 --output objective.json

The job is one micro-batch of SLM at the selection ratio: token losses, exact selection by excess loss, gradients of
hidden states and weight. Ways that cannot select (their backward pass is done in their forward pass) train on all
tokens. Ways that are not installed, or need a GPU, are skipped with the reason. Times are medians of repeats that
take turns. Memory is the peak of a process of its own, without inputs and gradients. The matrix limit is the time
that the way's FLOPs take as plain matrix products in the same run. The error of token losses is measured against
float64, on a part of the tokens.
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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from baselines.lm_head import WAYS, Problem, Unavailable
from rich.console import Console
from rich.table import Table

from megatron_slm.objective.linear_cross_entropy.api import linear_cross_entropy
from megatron_slm.objective.linear_cross_entropy.settings import LinearCrossEntropyConfig
from megatron_slm.runtime.console import make_console, progress
from megatron_slm.runtime.files import write_text

SIZES = {  # tokens N, hidden size H, vocabulary V
    "quickstart": (2048, 160, 4096),
    "1B": (2048, 2048, 32000),
    "7B": (4096, 4096, 32000),
    "llama3-8B": (4096, 4096, 128256),
}
ERROR_TOKENS, LOGIT_SCALE = 256, 4.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    result["loss_error_rms"] = loss_errors(problem)
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


def loss_errors(problem: Problem) -> dict[str, float]:
    """Return the rms error of token losses in nats, against float64, from logits in fp32 and in the weight's dtype.

    Hidden states are scaled to logits of standard deviation LOGIT_SCALE, which is that of a trained model.
    """
    tokens = slice(0, min(ERROR_TOKENS, len(problem.labels)))
    hidden, labels = problem.hidden.detach()[tokens] * LOGIT_SCALE, problem.labels[tokens]
    weight = problem.weight.detach()

    def exact(logits: torch.Tensor) -> torch.Tensor:
        return -logits.double().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)

    expected = exact(hidden.double() @ weight.double().t())
    engine = "triton" if hidden.is_cuda else "chunked"
    found = {
        "fp32 logits (ours)": linear_cross_entropy(
            hidden, weight, labels, LinearCrossEntropyConfig(engine=engine)
        ).loss,
        "logits in the weight's dtype": exact(F.linear(hidden, weight)),
    }
    return {name: float((loss - expected).square().mean().sqrt()) for name, loss in found.items()}


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
    errors = ", ".join(f"{name} {error:.2g}" for name, error in result["loss_error_rms"].items())
    console.print(f"error of token losses, nats rms: {errors}")


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
        from megatron_slm.mcore.cpu import redirect_cuda_to_cpu

        redirect_cuda_to_cpu()
    if arguments.memory_of:
        shape = shape_of(arguments.sizes[0], arguments)
        problem = Problem.make(shape, arguments.ratio, arguments.device, DTYPES[arguments.dtype])
        print(peak_bytes(arguments.memory_of, problem))
        return 0
    console = make_console()
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
            write_text(arguments.output, text + "\n", "--output")
    return 0


if __name__ == "__main__":
    sys.exit(main())
