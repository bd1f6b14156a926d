"""Import of Megatron-Core without the backend of torch's compiler on machines without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_slm.testing.tiny import command, make_corpus

RUN = """
import json, sys
from megatron_slm.cli.pretrain import main
code = main(json.loads(sys.argv[1]))
import torch
print(code, "torch._inductor.compile_fx" in sys.modules, torch.compile.__module__)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs use torch's compiler")
def test_a_run_does_not_import_the_compiler(tmp_path: Path) -> None:
    argv = command(make_corpus(tmp_path / "c", seed=1, documents=5), train_iters=1)
    result = subprocess.run([sys.executable, "-c", RUN, json.dumps(argv)], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1:] == ["0 False torch"], result.stderr
