"""Makes the helpers beside this file importable from every test; no property test fails because a machine is busy."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
