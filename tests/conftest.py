"""Import Megatron-Core as commands do, make the benchmarks importable, disable deadlines of property tests."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    """Import Megatron-Core before modules that use it; a process that only distributes tests to others needs none."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import megatron_slm.mcore.import_core  # noqa: F401
