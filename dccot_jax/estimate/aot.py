"""The compiler's own figures: the real train step, compiled for a TPU that is not there.

Needs libtpu (extra `aot`), whose compiler works without a chip. Compiling takes a minute or a few on a laptop's cores. An over-full
program is an answer, not an error: the compiler says how much it would have used.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies as jax_topologies
from ml_collections import ConfigDict

from dccot_jax.estimate.topologies import GIB, Topology, TopologyError
from dccot_jax.estimate.training import Training
from dccot_jax.model.sharding import make_mesh
from dccot_jax.train.adapters import abstract_trained
from dccot_jax.train.feed import abstract_batch
from dccot_jax.train.losses import distillation
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.step import abstract_state, make_train_step
from dccot_jax.train.teacher import abstract_teacher

# Without them libtpu looks for a chip, asks the cloud's metadata server, and refuses a second process.
_ENVIRONMENT = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB}


def compiler_memory(config: ConfigDict, training: Training, topology: Topology) -> dict[str, Any]:
    """Bytes per device of the compiled step.

    Returns:
      {"arguments", "temporaries", "outputs", "aliases", "total", "allocated", "fits", "seconds", "libtpu", "jax"}; total = arguments +
      temporaries + outputs - aliases; allocated is what the compiler lays out and compares with the chip's memory, less by what the
      total counts twice (None where this jax does not say). Of a program that does not fit only allocated is known, the rest is None.

    Raises:
      TopologyError: not a TPU, or libtpu does not know the slice.
    """
    mesh = make_mesh(training.mesh_sizes, tpu_devices(topology))
    started = time.monotonic()
    lowered = lowered_step(config, training, mesh)
    parts: dict[str, int | None] = dict.fromkeys(("arguments", "temporaries", "outputs", "aliases", "total"))
    allocated: int | None
    try:
        stats = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        allocated, fits = over_full(str(error)), False
        if allocated is None:
            raise
    else:
        parts = {
            "arguments": stats.argument_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "aliases": stats.alias_size_in_bytes,
            "total": stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes,
        }
        allocated = getattr(stats, "total_allocation_bytes", None)
        fits = True
    versions = {"libtpu": importlib.metadata.version("libtpu"), "jax": jax.__version__}
    return {**parts, "allocated": allocated, "fits": fits, "seconds": round(time.monotonic() - started, 1), **versions}


def lowered_step(config: ConfigDict, training: Training, mesh: jax.sharding.Mesh) -> Any:
    """The train step of a config's training, lowered for a mesh (`jax.stages.Lowered`)."""
    group = ConfigDict({**config.train, "microbatches": training.microbatches, "remat": training.remat})
    params, constants = abstract_trained(training.mc, mesh, group)
    settings = None
    if group.distill.kind != "none":
        settings = distillation(training.teacher, group.distill)._replace(attention=training.teacher_attention)
    constants |= abstract_teacher(settings, group.distill, mesh)
    state = abstract_state(params, make_optimizer(group), mesh, constants)
    batch = abstract_batch(mesh, training.rows, training.tokens, training.top_k)
    steps, dtype = max(group.steps, 1), jnp.dtype(training.compute_dtype)
    step = make_train_step(training.mc, mesh, group, dtype, steps=steps, attention=training.attention, distill=settings)
    with jax.set_mesh(mesh):
        return step.lower(state, batch)


def over_full(message: str) -> int | None:
    """Bytes a program would have used, arguments included, from the compiler's refusal; None if it is about something else.

    libtpu 0.0.50: "the total memory required for HLO temporaries (16.71G) exceeds available HBM (15.75G)"; earlier and later ones:
    "Used 21.30G of 15.75G hbm".
    """
    found = re.search(r"\(([\d.]+)([KMG]?)\) exceeds available HBM|Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm", message)
    if not found:
        return None
    number, unit = (part for part in found.groups() if part is not None)
    return int(float(number) * _UNITS[unit])


def tpu_devices(topology: Topology) -> Any:
    """The slice's devices, to compile for. Raises TopologyError: not a TPU, or libtpu does not know the slice."""
    if topology.chip.platform != "tpu":
        raise TopologyError(f"--aot: there is no compiler for {topology.name} without the machine; TPU slices have one")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    # One host holds a whole small slice; larger ones have 2 × 2 chips each, which is libtpu's default.
    bounds = {"chips_per_host_bounds": (*topology.shape, 1)[:3]} if topology.hosts == 1 else {}
    devices = jax_topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices
    if len(devices) != topology.chips:
        raise TopologyError(f"--aot: libtpu's {name} has {len(devices)} devices, {topology.chips} are expected")
    return devices
