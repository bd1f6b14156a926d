"""Test that checkpoints written by Megatron-LM give the token losses that Megatron-LM computed from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.checkpoint.frozen import load_frozen_model
from megatron_slm.checkpoint.megatron_lm.source import MegatronSource
from megatron_slm.config.schema import ParallelConfig
from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.inference.model import InferenceModel
from megatron_slm.inference.scoring import score_tokens
from megatron_slm.runtime import process
from megatron_slm.runtime.groups import ParallelLayout
from megatron_slm.testing.ranks import run_ranks

Job = tuple[str, int, int, int]
JOBS: dict[str, list[Job]] = {  # (name, TP, PP, EP); one process can run several layouts of one rank
    "one rank": [("llama", 1, 1, 1), ("gpt", 1, 1, 1), ("moe", 1, 1, 1), ("bf16", 1, 1, 1)],
    "pipeline": [("gpt", 1, 2, 1)],
    "experts": [("moe", 1, 1, 2)],
}
SAMPLES, LENGTH, VOCABULARY = 4, 16, 60  # as in record.py


@pytest.mark.parametrize("jobs", JOBS.values(), ids=JOBS)
def test_token_losses_equal_those_of_megatron_lm(recorded: Path, jobs: list[Job]) -> None:
    results = run_ranks(_losses, int(np.prod(jobs[0][1:])), recorded, jobs, initialize=False)[0]
    for (name, *_), found in zip(jobs, results, strict=True):
        expected = json.loads((recorded / name / "losses.json").read_text())["losses"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 if name == "bf16" else 2e-6)


def _losses(rank: int, world_size: int, recorded: Path, jobs: list[Job]) -> list[list[float]]:
    tokens = (np.arange(SAMPLES * (LENGTH + 1)) ** 2 * 7 % VOCABULARY).reshape(SAMPLES, -1)
    requests = [ScoringRequest(list(map(int, row)), 1) for row in tokens]
    results = []
    for name, tp, pp, ep in jobs:
        groups = process.start(ParallelLayout(tp, pp, expert=ep))
        source = MegatronSource.find(str(recorded / name), None, "--load")
        source.verify(checksums=True)
        parallel = ParallelConfig(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
        )
        config = replace(source.config(), parallel=parallel)
        tokenizer = source.tokenizer()
        rows = source.arguments["padded_vocab_size"]  # Megatron-LM's losses include the padding of the vocabulary
        dtype = config.training.params_dtype
        chunks = load_frozen_model(config, source.load_weights, vocab_size=rows, groups=groups, params_dtype=dtype)
        scores = score_tokens(InferenceModel(chunks, config, tokenizer, groups), requests)
        results.append([-float(value) for each in scores for value in each.log_probs])
        process.stop()
    return results
