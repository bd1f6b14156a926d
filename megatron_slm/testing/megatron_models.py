"""Command lines of runs with the models of tests/fixtures/megatron_lm_checkpoints."""

from __future__ import annotations

from typing import Any

TRAINING = [
    *("--num-layers", "2", "--hidden-size", "16", "--num-attention-heads", "4", "--seq-length", "16", "--mock-data"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "10", "--eval-iters", "0"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--tokenizer-type", "NullTokenizer", "--vocab-size", "60"),
    *("--lr", "1e-2", "--min-lr", "1e-3", "--lr-decay-style", "cosine", "--lr-warmup-iters", "1", "--num-workers", "0"),
    *("--weight-decay", "0.1", "--make-vocab-size-divisible-by", "16"),
]
LLAMA = [
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--untie-embeddings-and-output-weights", "--ffn-hidden-size", "32"),
    *("--group-query-attention", "--num-query-groups", "2"),
]
MODELS = {
    "llama": LLAMA,
    "gpt": [],
    "moe": [*LLAMA, "--num-experts", "4"],
    "bf16": [*LLAMA, "--bf16", "--qk-layernorm"],
}


def command(name: str, **flags: Any) -> list[str]:
    """Return the command line of a run with a recorded model; keyword arguments are further flags."""
    argv = [*TRAINING, *MODELS[name]]
    for flag, value in flags.items():
        argv += [f"--{flag.replace('_', '-')}", *([] if value is True else [str(value)])]
    return argv
