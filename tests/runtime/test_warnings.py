"""Known library warnings are suppressed on every rank; others are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import _main, command, make_corpus

MODULES = ("torch.distributed.c10d_logger", "megatron.core.dist_checkpointing.core", "megatron_slm.mcore.cpu")


def test_known_warnings_are_silent() -> None:
    program = (
        "import warnings, megatron_slm\n"
        f"for module in {(*MODULES, 'torch_extension', 'user')!r}:\n"
        "    warnings.warn_explicit('old', FutureWarning, module, 1, module=module, registry={})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["torch_extension", "user"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("warnings") / "corpus", 1)


def _errors(rank: int, world_size: int, commands: list[list[str]]) -> list[tuple[int, str]]:
    return [_main(rank, world_size, argv) for argv in commands]


def test_a_run_prints_no_warning(tmp_path: Path, corpus: str) -> None:
    """The settings of the recipes exercise most of Megatron-Core; the second run resumes."""
    settings = [
        *("--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        *("--recompute-granularity", "selective"),
        *("--objective", "slm", "--slm-score", "token-loss", "--slm-backward", "filtered"),
    ]
    save = tmp_path / "run"
    runs = [[*command(corpus, save, train_iters=steps, lr_decay_iters=2, load=save), *settings] for steps in (1, 2)]
    assert run_ranks(_errors, 1, runs, initialize=False) == [[(0, ""), (0, "")]]
