"""Make the benchmarks importable, and let no property test fail because a machine is busy."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
