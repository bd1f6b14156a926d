"""Import Megatron-Core as commands do, make the benchmarks importable, disable deadlines of property tests."""

import sys
from pathlib import Path

from hypothesis import settings

import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
