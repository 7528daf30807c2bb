"""Import reads and holds a process's share of the parameters and little more: anonymous memory of a process that loads a checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
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
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
TINY = ModelConfig("llama", 64, 16, 32, 2, 2, 2, 8)
SMALL = ModelConfig("llama", 256, 512, 10240, 2, 4, 2, 128)  # 33 M parameters, of which each of the MLP's three leaves is a third
LARGE = ModelConfig("llama", 50304, 2048, 6144, 16, 16, 8, 128, tie_embeddings=False)  # 1.0 G parameters


def write_random(folder: Path, mc: ModelConfig) -> Path:
    """A bfloat16 checkpoint of random bits, one tensor in memory at a time."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)

    def draw() -> Iterator[tuple[str, np.ndarray]]:
        for name, source in tensors(mc).items():
            bits = np.frombuffer(rng.bytes(2 * math.prod(source.shape)), np.uint16) & 0xBFFF  # no infinities, no NaNs
            yield name, bits.view(ml_dtypes.bfloat16).reshape(source.shape)

    shapes = {name: source.shape for name, source in tensors(mc).items()}
    write_safetensors(folder / "model.safetensors", shapes, np.dtype(ml_dtypes.bfloat16), draw())
    write_json(folder / "config.json", to_hf(mc))
    return folder


def check_memory(folder: Path, mc: ModelConfig, dtype: str, fsdp: int, processes: int) -> None:
    """Every process stays within its bound and reads its own bytes, once; the measurement sees the parameters. Prints its figures."""
    port = ""
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={fsdp // processes}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(HERE / "memory_driver.py"), str(folder / "tiny"), str(folder / "large"), dtype, str(fsdp), port]
    runs = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    found = []
    try:
        for run in runs:
            out, errors = run.communicate(timeout=1200)
            assert run.returncode == 0, errors[-3000:]
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for run in runs:
            run.kill()
    largest = max(2 * math.prod(shape) for shape in weight_shapes(mc)["layers"].values())
    stored = 2 * mc.num_params() / processes
    share = mc.num_params() * np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize / processes
    for index, process in enumerate(found):
        kept, most = process["target"], process["above"]
        print(
            f"{mc.num_params() / 1e9:.3f} G parameters as {dtype}, process {index} of {processes}: {process['read'] / 1e9:.3f} GB read,"
            f" {kept / 1e9:.3f} GB kept, at most {most / 1e9:.3f} GB anonymous: {(most - kept) / largest:.2f} x the largest stacked leaf"
            f" ({largest / 1e9:.3f} GB) above what is kept"
        )
        assert stored <= process["read"] <= 1.01 * stored
        assert share <= process["target"] <= 1.01 * share  # besides its part of each matrix a process holds the norms
        assert process["above"] <= process["target"] + 1.3 * largest, process
        assert process["above"] >= 0.95 * process["target"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_random(folder / "tiny", TINY)
    write_random(folder / "large", SMALL)
    return folder


@pytest.fixture(scope="module")
def billion(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("billion")
    write_random(folder / "tiny", TINY)
    write_random(folder / "large", LARGE)
    yield folder
    shutil.rmtree(folder)  # 2 GB, which pytest would keep


@pytest.mark.parametrize(("dtype", "fsdp", "processes"), [("float32", 1, 1), ("bfloat16", 2, 1)])
def test_a_small_checkpoint(small: Path, dtype: str, fsdp: int, processes: int):
    check_memory(small, SMALL, dtype, fsdp, processes)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "fsdp", "processes"), [("float32", 1, 1), ("bfloat16", 1, 1), ("bfloat16", 4, 2)])
def test_one_billion_parameters(billion: Path, dtype: str, fsdp: int, processes: int):
    check_memory(billion, LARGE, dtype, fsdp, processes)
