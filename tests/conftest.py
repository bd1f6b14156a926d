"""Import Megatron-Core as commands do, make the benchmarks importable, set up property tests, order packages."""

import gc
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
FIRST = ("scenario", "training", "reference", "checkpoint", "documentation", "preprocessing")  # long tests


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Use one worker more than cores, because tests wait for the processes that they start."""
    return (psutil.cpu_count() or 1) + 1


def pytest_configure(config: pytest.Config) -> None:
    """Import Megatron-Core before modules that use it; a process that only distributes tests to others needs none."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # until all tests are collected
        import megatron_slm.mcore.import_core  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run packages with long tests first, so that all workers end at nearly the same time."""
    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: min(order.get(part, len(order)) for part in item.path.parts))


def pytest_collection_finish() -> None:
    """Exclude modules and tests from garbage collections."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let extension modules find their objects collected at the end, without which some print warnings."""
    gc.unfreeze()
