"""Compare time, memory and FLOPs of the LM head's loss, forward and backward, with other implementations.

    python benchmarks/benchmark_objective.py --sizes quickstart 1B --tokens 512 --output objective.json

The task is one micro-batch of SLM: token losses, exact selection by excess loss, gradients of hidden states and weight.
Implementations that cannot select, since they run backward within the forward pass, train on all tokens. Unavailable
implementations are skipped with the reason. Times are medians over interleaved repeats. Memory is the peak of a
separate process, without inputs and gradients. The matrix limit is the time of an implementation's FLOPs as plain
matrix products in the same run. The error of token losses is measured against float64 on a subset of the tokens.
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
from baselines.lm_head import IMPLEMENTATIONS, Problem, Unavailable
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


def prepare(implementation: str, problem: Problem) -> Callable[[], None]:
    """Build an implementation, and run it once.

    Raises:
        Unavailable: it is not installed, or cannot run on this machine.
    """
    try:
        run = IMPLEMENTATIONS[implementation].make(problem)
        step(run, problem)
    except Unavailable:
        raise
    except ImportError as error:
        raise Unavailable(f"not installed ({error.name})") from error
    except Exception as error:  # a failed baseline is reported in the table
        raise Unavailable(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}") from error
    return run


def step(run: Callable[[], None], problem: Problem) -> float:
    """Return the seconds of one forward and backward pass."""
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
    """Return the seconds of one matrix product (2NHV FLOPs), the mean over the three products of a head."""
    hidden, weight = problem.hidden.detach().flatten(0, 1), problem.weight.detach()
    logits = hidden @ weight.t()
    products = (lambda: hidden @ weight.t(), lambda: logits @ weight, lambda: logits.t() @ hidden)

    def run() -> None:
        for product in products:
            product()

    return statistics.median(step(run, problem) for _ in range(repeats + 1)) / 3


def measure_times(implementations: Sequence[str], problem: Problem, repeats: int, name: str) -> dict[str, Any]:
    """Return the seconds of each implementation (or the reason it is skipped) and of a matrix product."""
    ready: dict[str, Callable[[], None]] = {}
    results: dict[str, Any] = {}
    for implementation in implementations:
        try:
            ready[implementation] = prepare(implementation, problem)
        except Unavailable as reason:
            results[implementation] = {"skipped": str(reason)}
    seconds: dict[str, list[float]] = {implementation: [] for implementation in ready}
    with progress(f"timing {name}", repeats * len(ready), "runs") as bar:
        for _ in range(repeats):
            for implementation, run in ready.items():
                seconds[implementation].append(step(run, problem))
                bar.advance()
    for implementation, values in seconds.items():
        results[implementation] = {"seconds": statistics.median(values), "fastest": min(values), "slowest": max(values)}
    return {"implementations": results, "matrix_seconds": matrix_seconds(problem, repeats)}


def peak_bytes(implementation: str, problem: Problem) -> int:
    """Return the peak memory of one run without inputs and gradients, in bytes. Runs in a separate process."""
    run = prepare(implementation, problem)
    problem.hidden.grad = problem.weight.grad = None
    gradients = sum(value.numel() * value.element_size() for value in (problem.hidden, problem.weight))
    if problem.hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before - gradients
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before - gradients


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(implementation: str, size: str, arguments: argparse.Namespace) -> int | str:
    """Return the peak memory in a new process in bytes, or an error message."""
    command = [sys.executable, __file__, "--memory-of", implementation, "--sizes", size, "--dtype", arguments.dtype]
    command += ["--device", arguments.device, "--ratio", str(arguments.ratio), "--threads", str(arguments.threads)]
    if arguments.tokens:
        command += ["--tokens", str(arguments.tokens)]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # return freed memory to the system, so that peaks are measured
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    return int(last) if done.returncode == 0 and last.lstrip("-").isdigit() else done.stderr.strip()[-200:]


def get_shape(size: str, arguments: argparse.Namespace) -> tuple[int, int, int]:
    tokens, width, entries = SIZES[size]
    return arguments.tokens or tokens, width, entries


def measure(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all results for one size."""
    shape = get_shape(size, arguments)
    problem = Problem.make(shape, arguments.ratio, arguments.device, DTYPES[arguments.dtype])
    result = measure_times(arguments.implementations, problem, arguments.repeats, size)
    measured = [implementation for implementation, figures in result["implementations"].items() if "seconds" in figures]
    result["loss_error_rms"] = loss_errors(problem)
    del problem
    with progress(f"memory of {size}", len(measured), "implementations") as bar:
        for implementation in measured if arguments.memory else []:
            result["implementations"][implementation]["peak_bytes"] = measure_memory(implementation, size, arguments)
            bar.advance()
    best = min(
        (
            result["implementations"][implementation]["seconds"]
            for implementation in measured
            if not IMPLEMENTATIONS[implementation].is_ours
        ),
        default=None,
    )
    logits = shape[0] * shape[2] * DTYPES[arguments.dtype].itemsize
    for implementation in measured:
        figures = result["implementations"][implementation]
        flops = IMPLEMENTATIONS[implementation].flops(arguments.ratio)
        figures["flops_in_nhv"] = flops
        figures["of_matrix_limit"] = figures["seconds"] / (flops / 2 * result["matrix_seconds"])
        figures["of_best_peer"] = figures["seconds"] / best if best else None
        if isinstance(figures.get("peak_bytes"), int):
            figures["peak_of_logits"] = figures["peak_bytes"] / logits
    return {"size": size, "shape": shape, **result}


def loss_errors(problem: Problem) -> dict[str, float]:
    """Return the rms error of token losses in nats, against float64, from logits in fp32 and in the weight's dtype.

    Hidden states are scaled to logits of standard deviation LOGIT_SCALE, typical of a trained model.
    """
    tokens = slice(0, min(ERROR_TOKENS, len(problem.labels)))
    hidden, labels = problem.hidden.detach()[tokens] * LOGIT_SCALE, problem.labels[tokens]
    weight = problem.weight.detach()

    def exact(logits: torch.Tensor) -> torch.Tensor:
        return -logits.double().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)

    expected = exact(hidden.double() @ weight.double().t())
    implementation = "triton" if hidden.is_cuda else "chunked"
    found = {
        "fp32 logits (ours)": linear_cross_entropy(
            hidden, weight, labels, LinearCrossEntropyConfig(implementation=implementation)
        ).loss,
        "logits in the weight's dtype": exact(F.linear(hidden, weight)),
    }
    return {name: float((loss - expected).square().mean().sqrt()) for name, loss in found.items()}


def print_table(console: Console, result: dict[str, Any]) -> None:
    tokens, width, entries = result["shape"]
    table = Table(title=f"{result['size']}: N = {tokens}, H = {width}, V = {entries}")
    for column in ("implementation", "FLOPs / NHV", "ms", "of best peer", "of matrix limit", "peak MiB", "of logits"):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    for implementation, figures in result["implementations"].items():
        if "skipped" in figures:
            table.add_row(implementation, figures["skipped"])
            continue
        peak = figures.get("peak_bytes")
        table.add_row(
            implementation,
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
    parser.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument("--tokens", type=int, help="number of tokens N instead of the size's default")
    parser.add_argument("--ratio", type=float, default=0.6, help="selection ratio k [0.6]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bf16 on a GPU, else fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch on the CPU")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory too")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # internal: measures memory in a subprocess
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
        shape = get_shape(arguments.sizes[0], arguments)
        problem = Problem.make(shape, arguments.ratio, arguments.device, DTYPES[arguments.dtype])
        print(peak_bytes(arguments.memory_of, problem))
        return 0
    console = make_console()
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "CPU"
    settings = {"device": device, "torch": torch.__version__, "dtype": arguments.dtype, "threads": arguments.threads}
    settings |= {"ratio": arguments.ratio, "repeats": arguments.repeats}
    console.print(settings)
    results = []
    for size in arguments.sizes:
        results.append(measure(size, arguments))
        print_table(console, results[-1])
        if arguments.output:
            text = json.dumps({**settings, "sizes": results}, indent=1)
            write_text(arguments.output, text + "\n", "--output")
    return 0


if __name__ == "__main__":
    sys.exit(main())
