"""Run the cases of on_triton.py in Triton's interpreter on a CPU, and on a GPU if available.

The interpreter accepts more than the compiler does, so the kernels are also compiled for Hopper, which needs no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("on_triton.py")


def run_cases(**environment: str) -> None:
    """Run in a separate process, since Triton reads its environment when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_kernels_under_the_interpreter() -> None:
    run_cases(TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_hopper(dtype: str, softcap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from megatron_slm.objective.linear_cross_entropy import triton_math

    common = {"logits": "*fp32", "labels": "*i64", "width": "i32", "stride": "i32", "softcap": "fp32"}
    flags = {"HAS_SOFTCAP": softcap, "TILE": 4096}
    outputs = dict.fromkeys(("highest_out", "total_out", "label_logit_out", "weighted_out"), "*fp32")
    factors = dict.fromkeys(("highest", "scale", "loss_weight"), "*fp32")
    for kernel, arguments, constants in (
        (triton_math._statistics_kernel, {**common, **outputs}, {**flags, "WITH_ENTROPY": softcap, "LOWEST": -1000.0}),
        (triton_math._gradient_kernel, {**common, **factors, "gradient_out": f"*{dtype}"}, flags),
    ):
        signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert compiled.asm["cubin"]


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_kernels_on_a_gpu() -> None:
    run_cases(TRITON_INTERPRET="0")
