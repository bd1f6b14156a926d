"""Test that the threshold benchmark runs, and that its communication is independent of the number of values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parent.parent.parent / "benchmarks" / "benchmark_threshold.py"


def test_communication_is_independent_of_the_value_count(tmp_path: Path) -> None:
    reports = []
    for values in (500, 4000):
        output = tmp_path / f"{values}.json"
        flags = ["--ranks", "1", "2", "--values", str(values), "--repeats", "1", "--output", str(output)]
        subprocess.run([sys.executable, str(TOOL), *flags], check=True, timeout=120)
        reports.append(json.loads(output.read_text()))
        assert output.with_suffix(".png").stat().st_size > 1000
    for report in reports:
        assert [row["ranks"] for row in report["rows"]] == [1, 2]
        assert report["rows"][1]["bytes_per_rank"] == (2048 + 2048 + 1024) * 8 <= 48 * 1024
        assert "not measured" in report["estimate"]["text"]
