"""Wrapper of `python`, `torchrun` and `make` in documented commands, which runs them with small settings.

Named as the first argument, followed by the arguments of the documented command. Flags that come later on a command
line win, so that appending them shrinks a command without changing how it reads.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TRAINING = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64", "--num-attention-heads", "4"),
    *("--num-query-groups", "2", "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4"),
    *("--train-iters", "2", "--eval-interval", "2", "--eval-iters", "1", "--lr-warmup-iters", "1"),
    *("--num-workers", "0"),
]
SMALLER = {
    "megatron_slm.pretrain": TRAINING,
    "train_tokenizer.py": ["--vocab-size", "400"],
    "preprocess_data.py": ["--workers", "2"],
    "preprocess_sft.py": ["--seq-length", "32"],
    "score_corpus.py": [],
    "convert_checkpoint.py": [],
    "generate_text.py": ["--max-new-tokens", "4"],
    "show_selection.py": [],
    "report.py": [],
    "plot_metrics.py": [],
    "merge_datasets.py": [],
    "inspect_dataset.py": [],
    "plan_run.py": [],
}
ELSEWHERE = {  # command -> reason for not running it here
    "benchmark_preprocess.py": "needs a work tree of Megatron-LM; tests/preprocessing runs its parts",
    "benchmark_training.py": "runs in tests/benchmarks",
    "benchmark_generation.py": "runs in tests/benchmarks",
    "benchmark_objective.py": "runs in tests/benchmarks",
    "benchmark_bubbles.py": "runs in tests/benchmarks",
    "benchmark_known_selection.py": "runs in tests/benchmarks",
    "benchmark_threshold.py": "runs in tests/benchmarks",
    "pytest": "runs tests that need a GPU",
}


def main() -> None:
    """Let the server of programs run the small command; print a note for a command tested elsewhere."""
    program, *arguments = sys.argv[1:]
    if program == "make":
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        sys.exit(0 if all(f"\n{name}:" in targets for name in arguments) else f"no such target: {arguments}")
    if program == "torchrun":
        place = next(i for i, word in enumerate(arguments) if word == "-m" or word.endswith(".py"))
        arguments = arguments[place:]
    module = arguments[0] == "-m"
    name = arguments[1] if module else Path(arguments[0]).name
    if name in ELSEWHERE:
        print(f"skipped {name}: {ELSEWHERE[name]}")
        return
    ranks = 2 if program == "torchrun" else 0
    request = [[*arguments, *SMALLER[name]], dict(os.environ), str(Path.cwd()), ranks]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(os.environ["PROGRAM_SERVER"])
        socket.send_fds(client, [json.dumps(request).encode()], [1, 2])
        sys.exit(client.recv(1)[0])


if __name__ == "__main__":
    main()
