"""Compare the speed of greedy generation with and without a key-value cache, and with transformers, in one process.

    python benchmarks/benchmark_generation.py --size quickstart --batches 1 8 --output generation.json

A Llama model with random weights is written to a temporary directory, and every implementation continues the same
prompts by the same number of tokens, in turn. Their tokens must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.runtime.files import write_text


@dataclass(frozen=True)
class Size:
    """Represent a model, its prompts and their continuations."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    prompt: int
    new: int


SIZES = {
    "tiny": Size(2, 64, 4, 512, 8, 8),
    "quickstart": Size(4, 160, 4, 4096, 32, 224),
    "medium": Size(8, 512, 8, 16000, 64, 448),
}
Generate = Callable[[list[list[int]]], list[list[int]]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="quickstart", help="size of the model and of the texts")
    add("--batches", type=int, nargs="+", default=[1, 8], help="prompts per batch")
    add("--rounds", type=int, default=5, help="measured rounds of every implementation")
    add("--output", type=Path, help="JSON file for the result")
    return parser.parse_args()


def save_model(size: Size, directory: Path) -> Any:
    """Write a Llama model with random weights, and return it."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.prompt + size.new,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def implementations(size: Size, directory: Path) -> dict[str, Generate]:
    """Return a function from prompts to new tokens for each implementation."""
    import torch

    from megatron_slm.config.schema import ParallelConfig
    from megatron_slm.inference.generation import generate
    from megatron_slm.inference.model import open_model
    from megatron_slm.inference.sampling import Decoding
    from megatron_slm.runtime import process
    from megatron_slm.runtime.groups import ParallelLayout

    published = save_model(size, directory)
    tokenizer = {"tokenizer_type": "NullTokenizer", "vocab_size": size.vocabulary}
    groups = process.start(ParallelLayout())
    model = open_model(str(directory), ParallelConfig(), groups, tokenizer_settings=tokenizer)
    decoding = Decoding(max_new_tokens=size.new, greedy=True, ignore_eos=True)

    def ours(prompts: list[list[int]], *, use_cache: bool) -> list[list[int]]:
        results = generate(model, prompts, decoding, micro_batch_size=len(prompts), use_cache=use_cache)
        return [result.tokens for result in results]

    def transformers(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": size.new, "do_sample": False, "pad_token_id": 0}
        return published.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.size(1) :].tolist()

    return {
        "cache": lambda prompts: ours(prompts, use_cache=True),
        "no cache": lambda prompts: ours(prompts, use_cache=False),
        "transformers": transformers,
    }


def measure(size: Size, batches: Sequence[int], rounds: int, directory: Path) -> dict[str, dict[int, float]]:
    """Return the median tokens/s by implementation and batch.

    Raises:
        AssertionError: the tokens of two implementations differ.
    """
    functions = implementations(size, directory)
    times: dict[tuple[str, int], list[float]] = {}
    for batch in batches:
        prompts = [[(7 * row + 3 * column) % size.vocabulary for column in range(size.prompt)] for row in range(batch)]
        for number in range(rounds + 1):
            expected = None
            for name, function in functions.items():
                start = time.perf_counter()
                tokens = function(prompts)
                if number:  # the first round warms up
                    times.setdefault((name, batch), []).append(time.perf_counter() - start)
                expected = tokens if expected is None else expected
                assert tokens == expected, f"{name} generates other tokens"
    return {
        name: {batch: batch * size.new / statistics.median(times[name, batch]) for batch in batches}
        for name in functions
    }


def main() -> None:
    arguments = parse_arguments()
    from megatron_slm.runtime import process

    with tempfile.TemporaryDirectory() as directory:
        rates = measure(SIZES[arguments.size], arguments.batches, arguments.rounds, Path(directory))
    process.stop()
    print(f"{'tokens/s':14}" + "".join(f"{f'batch {batch}':>12}" for batch in arguments.batches))
    for name, by_batch in rates.items():
        print(f"{name:14}" + "".join(f"{rate:12,.0f}" for rate in by_batch.values()))
    if arguments.output:
        write_text(arguments.output, json.dumps(rates, indent=1), "--output")


if __name__ == "__main__":
    main()
