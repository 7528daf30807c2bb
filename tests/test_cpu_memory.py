"""Freed memory is kept on one CPU device, and nowhere else: page faults of a program that needs 64 MiB each time it runs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
PROGRAM = """
import resource
import jax, jax.numpy as jnp
from dccot_jax import cpu_memory

print(cpu_memory.keep())
x = jnp.ones((4096, 64), jnp.float32)
run = jax.jit(lambda x: (x @ x.T) @ x)  # 64 MiB between the products
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**more: str) -> tuple[str, int]:
    """What `keep` says, and the fewest page faults of a run."""
    names = ("XLA_FLAGS", "GLIBC_TUNABLES")
    environment = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env={**environment, "JAX_PLATFORMS": "cpu", **more}, capture_output=True, text=True, check=True)
    said, *counts = done.stdout.split()
    return said, min(map(int, counts))


def test_memory_is_not_asked_for_again() -> None:
    assert faults(MALLOC_TOP_PAD_="0")[0] == "False"
    said, again = faults()
    assert said == "True"
    assert again < 1000  # 64 MiB are 16384 pages


def test_several_devices_are_left_alone() -> None:
    said, again = faults(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert said == "False"
    assert again > 1000
