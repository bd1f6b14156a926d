"""Run the cases of on_triton.py in Triton's interpreter on a CPU, and on a GPU if available.

The interpreter accepts more than the compiler does, so the kernels are also compiled for Hopper, which needs no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_slm.objective.linear_cross_entropy.chunk_math import aligned_width, empty_chunk

ALIGNED = ("logits", "gradient_out", "stride", "padded")
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
def test_kernels_have_vector_loads_on_hopper(
    dtype: str, softcap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, stride and padded width are multiples of 16, which Triton detects at each call; the width is any."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from megatron_slm.objective.linear_cross_entropy import triton_math

    sizes = dict.fromkeys(("width", "padded", "stride"), "i32")
    common = {"logits": "*fp32", "labels": "*i64", **sizes, "softcap": "fp32"}
    flags = {"HAS_SOFTCAP": softcap, "TILE": 4096}
    outputs = dict.fromkeys(("highest_out", "total_out", "label_logit_out", "weighted_out"), "*fp32")
    factors = dict.fromkeys(("highest", "scale", "loss_weight"), "*fp32")
    per_thread = 4096 // (8 * 32)
    gradient = {**common, **factors, "gradient_out": f"*{dtype}", "row_indices": "*i64"}
    for kernel, arguments, constants, stored in (
        (triton_math._statistics_kernel, {**common, **outputs}, {"WITH_ENTROPY": softcap, "LOWEST": -1000.0}, 0),
        (triton_math._gradient_kernel, gradient, {"PICKS_ROWS": False}, per_thread),
        (triton_math._gradient_kernel, gradient, {"PICKS_ROWS": True}, per_thread),
    ):
        signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
        aligned = [kernel.arg_names.index(name) for name in arguments if name in ALIGNED]
        attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs={**flags, **constants}, attrs=attributes)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert compiled.asm["cubin"]
        code = compiled.asm["ptx"]
        assert len(re.findall(r"ld\.global\.v4\.b32", code)) == per_thread // 4
        assert len(re.findall(r"st\.global\.v4\.b32", code)) == stored // (8 if dtype == "bf16" else 4)


@needs_triton
@pytest.mark.parametrize("width", [1, 50_257, 32_000, 256])
def test_rows_of_chunks_are_padded_to_aligned_widths(width: int) -> None:
    from megatron_slm.objective.linear_cross_entropy import triton_math

    chunk = torch.empty(2, aligned_width(width))[:, :width]
    for each in (chunk, empty_chunk(chunk, 1, torch.bfloat16)):
        assert triton_math._padded(each) == each.stride(0) == aligned_width(width)
        assert each.stride(0) % 16 == 0
    assert triton_math._padded(torch.empty(2, 1000)[:, :width]) == min(width, 1000), "other entries follow"


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_kernels_on_a_gpu() -> None:
    run_cases(TRITON_INTERPRET="0")
