"""Checkpoints of tiny models: a trained one, one with large random weights, and one with experts."""

from pathlib import Path

import pytest

from megatron_slm.testing.tiny import command, launch_each, make_corpus

SHARED = {"num_layers": 2, "eval_iters": 0, "seq_length": 64}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory: Path = tmp_path_factory.mktemp("inference")
    corpus = make_corpus(directory / "corpus", 1)
    variants = {
        "trained": {"train_iters": 10},
        "random": {"train_iters": 1, "init_method_std": 0.3, "lr": 1e-6, "num_layers": 4},
        "experts": {"train_iters": 1, "init_method_std": 0.3, "lr": 1e-6, **EXPERTS},
    }
    launch_each([command(corpus, directory / name, **{**SHARED, **flags}) for name, flags in variants.items()])
    return {name: str(directory / name) for name in variants}
