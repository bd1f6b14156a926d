"""Make the benchmarks importable, and disable the deadlines of property tests."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
