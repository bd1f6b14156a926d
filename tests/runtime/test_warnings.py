"""Known warnings of libraries are silent on every rank, and others are not."""

from __future__ import annotations

import subprocess
import sys

KNOWN = (
    "`load_state_dict` is deprecated and will be removed in future versions. Please use `load` instead.",
    "Please use DTensor instead and we are deprecating ShardedTensor.",
)


def test_known_warnings_are_silent() -> None:
    program = f"import warnings, megatron_slm\nfor text in {(*KNOWN, 'another')!r}: warnings.warn(text, FutureWarning)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.count("FutureWarning") == 1 and "another" in done.stderr
