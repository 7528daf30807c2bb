"""Import holds a process's share of the parameters and little more: anonymous memory of a process that loads a checkpoint."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dccot_jax.model.config import ModelConfig
from dccot_jax.model.hf_config import to_hf
from dccot_jax.model.hf_files import write_json
from dccot_jax.model.hf_names import tensors
from dccot_jax.model.safetensors_io import write_safetensors
from dccot_jax.model.sharding import weight_shapes

HERE = Path(__file__).parent
TINY = ModelConfig("llama", 64, 16, 32, 2, 2, 2, 8)
SMALL = ModelConfig("llama", 256, 512, 10240, 2, 4, 2, 128)  # 33 M parameters, of which each of the MLP's three leaves is a third
LARGE = ModelConfig("llama", 50304, 2048, 6144, 16, 16, 8, 128, tie_embeddings=False)  # 1.0 G parameters


def write_random(folder: Path, mc: ModelConfig) -> Path:
    """A bfloat16 checkpoint of random bits, one tensor in memory at a time."""
    rng = np.random.default_rng(0)
    folder.mkdir()

    def draw() -> Iterator[tuple[str, np.ndarray]]:
        for name, source in tensors(mc).items():
            bits = np.frombuffer(rng.bytes(2 * math.prod(source.shape)), np.uint16) & 0xBFFF  # no infinities, no NaNs
            yield name, bits.view(ml_dtypes.bfloat16).reshape(source.shape)

    shapes = {name: source.shape for name, source in tensors(mc).items()}
    write_safetensors(folder / "model.safetensors", shapes, np.dtype(ml_dtypes.bfloat16), draw())
    write_json(folder / "config.json", to_hf(mc))
    return folder


def measure(tmp_path: Path, mc: ModelConfig, dtype: str, fsdp: int) -> tuple[dict, int]:
    """What the driver printed, and the bytes of the largest stacked leaf in the checkpoint's dtype."""
    tiny, large = write_random(tmp_path / "tiny", TINY), write_random(tmp_path / "large", mc)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={fsdp}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(HERE / "memory_driver.py"), str(tiny), str(large), dtype, str(fsdp)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), max(2 * math.prod(shape) for shape in weight_shapes(mc)["layers"].values())


def check(found: dict, largest: int, mc: ModelConfig, itemsize: int) -> None:
    assert found["target"] >= mc.num_params() * itemsize
    assert found["above"] <= found["target"] + 1.3 * largest
    assert found["above"] >= 0.95 * found["target"]  # the measurement sees the parameters


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "fsdp"), [("float32", 1), ("bfloat16", 2)])
def test_a_small_checkpoint(tmp_path: Path, dtype: str, fsdp: int):
    check(*measure(tmp_path, SMALL, dtype, fsdp), SMALL, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "fsdp"), [("float32", 1), ("bfloat16", 4)])
def test_one_billion_parameters(tmp_path: Path, dtype: str, fsdp: int):
    check(*measure(tmp_path, LARGE, dtype, fsdp), LARGE, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize)
