"""Shared fixtures; the default suite needs no network, no torch and no files outside the repository."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "DCCOT_COMPILE_CACHE" not in os.environ:  # of this run alone, for all its workers and the commands they start
    os.environ["DCCOT_COMPILE_CACHE"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["DCCOT_COMPILE_CACHE"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # small programs: compiling them is most of the suite's time

import pytest

from dccot_jax import compile_cache

compile_cache.enable()

ROOT = Path(__file__).resolve().parent.parent
LONGEST = (
    "test_kill_resume.py",
    "test_process_faults.py",
    "test_soak.py",
    "test_object_store.py",
)  # begun first: none is left alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Public task data and teacher traces: $DCCOT_DATA, else ../shared/data beside the checkout."""
    path = Path(os.environ.get("DCCOT_DATA") or ROOT.parent / "shared" / "data")
    if not (path / "manifest.json").exists():
        pytest.skip(f"no task data at {path}; set DCCOT_DATA")
    return path


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """A real pretrained student: $DCCOT_SMOLLM2, else the cache folder."""
    path = Path(os.environ.get("DCCOT_SMOLLM2") or Path.home() / ".cache" / "dccot_jax" / "smollm2-135m-instruct")
    if not (path / "config.json").exists():
        pytest.skip(f"no SmolLM2-135M-Instruct at {path}; set DCCOT_SMOLLM2")
    return path
