"""Time the exact distributed threshold against gathering all values and torch.topk, over 1, 2, 4, 8 gloo ranks.

Both implementations run in the same processes, interleaved by repeat, and must compute the same threshold. Times are
medians over repeats of the slowest rank. If there are more ranks than cores, the report marks them as oversubscribed.
The plot is written to the JSON file's name with .png.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.objective.selection.threshold import select_highest
from megatron_slm.runtime.files import atomic_path, write_text

RATIO = 0.6
EXTRAPOLATED_RANKS = 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of processes")
    add("--values", type=int, default=10**6, help="values on each rank")
    add("--repeats", type=int, default=9)
    add("--hop-latency-us", type=float, default=5.0, help="latency of one message between two ranks, for the estimate")
    add("--link-gbytes-per-second", type=float, default=25.0, help="bandwidth of one rank, for the estimate")
    add("--output", type=Path, required=True, help="JSON file; the plot has its name and .png")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if min(*arguments.ranks, arguments.values, arguments.repeats) < 1:
        print("error: --ranks, --values and --repeats must be above 0.", file=sys.stderr)
        return 2
    rows = []
    for ranks in arguments.ranks:
        rows.append(row := measure(ranks, arguments.values, arguments.repeats))
        print(
            f"{ranks:>4} ranks x {arguments.values:,}: threshold {row['threshold_ms']:.1f} ms, gather and topk "
            f"{row['gather_topk_ms']:.1f} ms ({row['speedup']:.1f}x), {row['bytes_per_rank'] / 1024:.0f} KiB on the "
            f"wire in {row['rounds']} rounds against {row['gather_bytes_per_rank'] / 2**20:.1f} MiB",
            flush=True,
        )
    report = {
        "machine": {"cores": os.cpu_count(), "processor": platform.processor(), "torch": torch.__version__},
        "values_per_rank": arguments.values,
        "ratio": RATIO,
        "repeats": arguments.repeats,
        "oversubscribed": [ranks for ranks in arguments.ranks if ranks > (os.cpu_count() or 1)],
        "rows": rows,
        "estimate": estimate(rows, arguments.hop_latency_us, arguments.link_gbytes_per_second),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, json.dumps(report, indent=2) + "\n", "--output")
    plot(rows, arguments.output.with_suffix(".png"))
    print(report["estimate"]["text"])
    return 0


def measure(ranks: int, values: int, repeats: int) -> dict[str, Any]:
    """Run both implementations on ``ranks`` single-threaded processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        answers = context.SimpleQueue()
        arguments = (ranks, values, repeats, f"file://{directory}/rendezvous", answers)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a process failed with {ranks} ranks")
        return answers.get()


def _rank(rank: int, ranks: int, values: int, repeats: int, rendezvous: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    scores = torch.randn(values, generator=torch.Generator().manual_seed(rank))
    count = math.ceil(RATIO * values * ranks)
    sent = _CountedMessages()
    implementations = {
        "threshold": lambda: _exact(scores, count, rank),
        "gather_topk": lambda: _gather_and_topk(scores, count, ranks),
    }
    thresholds = {name: _timed(implementation)[1] for name, implementation in implementations.items()}  # also warms up
    assert thresholds["threshold"] == thresholds["gather_topk"], f"the thresholds differ: {thresholds}"
    with sent:
        implementations["threshold"]()
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(repeats):
        for name, implementation in implementations.items():
            seconds[name].append(_timed(implementation)[0])
    if rank == 0:
        ours, peer = (1e3 * statistics.median(seconds[name]) for name in implementations)
        answers.put(
            {
                "ranks": ranks,
                "threshold_ms": ours,
                "gather_topk_ms": peer,
                "speedup": peer / ours,
                "bytes_per_rank": sent.bytes,
                "rounds": sent.rounds,
                "gather_bytes_per_rank": 4 * values * (ranks - 1),
                "seconds": seconds,
            }
        )
    dist.destroy_process_group()


def _exact(scores: Tensor, count: int, rank: int) -> float:
    order = torch.arange(rank * len(scores), (rank + 1) * len(scores))[None]
    valid = torch.ones(1, len(scores), dtype=torch.bool)
    _, threshold = select_highest(scores[None], valid, torch.tensor([count]), order, dist.group.WORLD)
    return float(threshold)


def _gather_and_topk(scores: Tensor, count: int, ranks: int) -> float:
    everything = torch.empty(ranks * len(scores))
    dist.all_gather(list(everything.chunk(ranks)), scores)
    threshold = float(everything.topk(count).values[-1])
    (scores >= threshold).sum()
    return threshold


def _timed(implementation: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds of the slowest rank, and the result of ``implementation``."""
    dist.barrier()
    began = time.perf_counter()
    result = implementation()
    taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken), result


class _CountedMessages:
    """Count the bytes and calls of ``dist.all_reduce`` in the block."""

    def __init__(self) -> None:
        self.bytes = self.rounds = 0

    def __enter__(self) -> None:
        self.all_reduce = dist.all_reduce

        def counted(tensor: Tensor, *more: Any, **options: Any) -> Any:
            self.bytes += tensor.numel() * tensor.element_size()
            self.rounds += 1
            return self.all_reduce(tensor, *more, **options)

        dist.all_reduce = counted

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.all_reduce


def estimate(rows: list[dict[str, Any]], hop_us: float, gbytes: float) -> dict[str, Any]:
    """Estimate (not measure) the cost of the threshold on many ranks."""
    alone = min(rows, key=lambda row: row["ranks"])
    widest = max(rows, key=lambda row: row["ranks"])
    rounds, size = widest["rounds"] or 3, widest["bytes_per_rank"] or 40960
    hops = 2 * math.ceil(math.log2(EXTRAPOLATED_RANKS))
    wire = rounds * hops * hop_us * 1e-3 + 2 * size / (gbytes * 1e9) * 1e3
    text = (
        f"estimate, not measured, for {EXTRAPOLATED_RANKS} ranks with a core each: {wire:.2f} ms on the wire, "
        f"from {rounds} rounds x {hops} hops of a tree all-reduce (up and down) x {hop_us:g} µs and 2 x "
        f"{size / 1024:.0f} KiB at {gbytes:g} GB/s, in addition to counting each rank's values, which took "
        f"{alone['threshold_ms']:.1f} ms for {alone['ranks']} rank here. Stragglers and congestion are not included."
    )
    return {"ranks": EXTRAPOLATED_RANKS, "wire_ms": wire, "hops": hops, "hop_latency_us": hop_us, "text": text}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot time and speed-up by number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5.5, 4), layout="constrained")
    ranks = [row["ranks"] for row in rows]
    for name, label, color in (
        ("gather_topk_ms", "all-gather and topk", "#D55E00"),
        ("threshold_ms", "radix select", "#0072B2"),
    ):
        panel.plot(ranks, [row[name] for row in rows], color=color, marker="o", label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ranks, [str(number) for number in ranks])
    panel.set_xlabel(f"ranks on {os.cpu_count()} cores")
    panel.set_ylabel("milliseconds, slowest rank")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    with atomic_path(path, "--output") as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
