"""Makes the helpers here and the tools importable from every test; no property test fails because a machine is busy."""

import sys
from pathlib import Path

from hypothesis import settings

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
