"""Runs the cases of on_triton.py where Triton's kernels can run: its interpreter on a CPU, and a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("on_triton.py")


def run_cases(**environment: str) -> None:
    """In a process of its own: Triton reads its environment when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    run_cases(TRITON_INTERPRET="0")
