"""The benchmark scripts run as printed and write what they promise; speed itself is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_input_pipeline(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, BENCHMARKS / "input_pipeline.py", "--rows", "3000", "--seconds", "0.2", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["goals"]) < set(result) and all(result[name] > 0 for name in result["goals"])
    assert set(result["detail"]["row_tokens"]) == {"512", "4096"} and result["detail"]["tokenising"]["rows_per_second"] > 0
    assert "tokens/s" in done.stdout
