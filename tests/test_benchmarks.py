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


def _gpu(*words, **options):
    return subprocess.run([sys.executable, BENCHMARKS / "gpu.py", *words], capture_output=True, text=True, timeout=300, **options)


def test_gpu_says_where_there_is_none():
    done = _gpu("--shape", "tiny")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("no GPU: JAX's first device is cpu")


@pytest.mark.slow
def test_gpu_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    sizes = ["--rows", "2", "--row_tokens", "64", "--document_tokens", "16", "--batches", "1", "--remat", "none", "--steps", "1"]
    done = _gpu("--shape", "tiny", "--allow-cpu", "--no-peer", "--peak_tflops", "1", *sizes, "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    measured = result["detail"]["shapes"]["tiny"]["ours"]["1 none"]
    # 6 per weight and token, tied head included, and 6·N·H·S·L for attention over documents of 16
    weights = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128) + 512 * 64
    assert measured["flops"] == 2 * 64 * (6 * weights + 2 * 6 * 64 * 16)
    assert result["ratio_mfu_tiny"] == pytest.approx(measured["flops"] / measured["seconds"] / 1e12)


@pytest.mark.slow
def test_startup(tmp_path):
    out = tmp_path / "startup.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "startup.py", "--shape", "25m", "--json", out], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    first, second = result["detail"]["starts"]
    assert result["ratio_second_start"] > 0 and result["detail"]["cache_mb"] > 0
    assert set(first) == set(second) == {"import", "devices", "trace", "lower", "compile", "process"}
